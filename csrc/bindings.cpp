// The Python module. Shapes and dtypes are checked here, so that everything else may trust its pointers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lens/divergence.hpp"
#include "lens/fused_lens.hpp"
#include "lens/mean_unembedding.hpp"
#include "ranks/rank_agreement.hpp"
#include "ranks/trajectory.hpp"
#include "screen/screen.hpp"

namespace py = pybind11;

namespace refinelens {

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;
using OptionalFloats = std::optional<Array<float>>;

constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();

std::string shape_text(const py::array& a) { return py::str(a.attr("shape")).cast<std::string>(); }

std::string dtype_text(const py::array& a) { return py::str(a.dtype()).cast<std::string>(); }

void check_length(const py::array& a, const std::string& name, py::ssize_t expected) {
  if (a.ndim() != 1 || a.shape(0) != expected)
    throw py::value_error(name + ": expected shape (" + std::to_string(expected) + ",), got " + shape_text(a));
}

// `what` are the numbers in the array.
void check_below(const Array<int64_t>& ids, const std::string& name, const char* what, int64_t end) {
  const int64_t* values = ids.data();
  for (py::ssize_t i = 0; i < ids.size(); ++i)
    if (values[i] < 0 || values[i] >= end)
      throw py::value_error(name + ": expected " + what + " below " + std::to_string(end) + ", got " +
                            std::to_string(values[i]));
}

void check_ids(const Array<int64_t>& ids, const std::string& name, const char* what, py::ssize_t length, int64_t end) {
  check_length(ids, name, length);
  check_below(ids, name, what, end);
}

// The dtype tells the elements: float32, float16, or uint16 for the bits of bf16, which numpy does not have.
Matrix as_matrix(const py::array& a, const std::string& name) {
  if (a.ndim() != 2) throw py::value_error(name + ": expected two dimensions, got shape " + shape_text(a));
  const char kind = a.dtype().kind();
  const py::ssize_t size = a.itemsize();
  if (!(kind == 'f' && (size == 4 || size == 2)) && !(kind == 'u' && size == 2))
    throw py::value_error(name + ": expected float32, float16 or uint16 (the bits of bf16), got " + dtype_text(a));
  const Element element = size == 4 ? Element::fp32 : kind == 'f' ? Element::fp16 : Element::bf16;
  return {a.data(), element, a.shape(0), a.shape(1), a.strides(0) / size, a.strides(1) / size};
}

// The fused lens.

const float* checked(const OptionalFloats& a, const char* name, int64_t length) {
  if (!a) return nullptr;
  check_length(*a, name, length);
  return a->data();
}

void check_product(const Matrix& hidden, const Matrix& unembedding) {
  if (hidden.columns != unembedding.columns || hidden.columns == 0 || unembedding.rows == 0 ||
      unembedding.rows > kMaxTokens)
    throw py::value_error("hidden and unembedding: expected one d_model above 0 and 1 to 2^31 - 1 tokens, got " +
                          std::to_string(hidden.columns) + " and " + std::to_string(unembedding.rows) + " by " +
                          std::to_string(unembedding.columns));
}

NormSpec::Kind norm_kind(const std::string& name) {
  if (name == "none") return NormSpec::none;
  if (name == "layer") return NormSpec::layer;
  if (name == "rms") return NormSpec::rms;
  throw py::value_error("norm: expected none, layer or rms, got " + name);
}

void check_targets(const Array<int64_t>& targets, py::ssize_t rows, int64_t vocab_size) {
  if (targets.ndim() != 2 || targets.shape(0) != rows)
    throw py::value_error("targets: expected shape (" + std::to_string(rows) + ", n), got " + shape_text(targets));
  check_below(targets, "targets", "ids", vocab_size);
}

py::tuple run_fused_lens(const py::array& hidden, const py::array& unembedding, const std::string& norm,
                         const OptionalFloats& norm_weight, const OptionalFloats& norm_bias, double norm_eps,
                         const std::optional<Array<int64_t>>& targets, const OptionalFloats& bias, float scale,
                         float softcap, int n_threads, int64_t top_k) {
  const Matrix rows = as_matrix(hidden, "hidden"), tokens = as_matrix(unembedding, "unembedding");
  check_product(rows, tokens);
  const NormSpec spec{norm_kind(norm), checked(norm_weight, "norm_weight", rows.columns),
                      checked(norm_bias, "norm_bias", rows.columns), norm_eps};
  if (targets) check_targets(*targets, rows.rows, tokens.rows);
  if (top_k < 0 || top_k > tokens.rows)
    throw py::value_error("top_k: expected 0 to " + std::to_string(tokens.rows) + ", got " + std::to_string(top_k));
  const LensProblem problem{rows,  spec,    tokens, checked(bias, "bias", tokens.rows),
                            scale, softcap, targets ? targets->data() : nullptr, targets ? targets->shape(1) : 0};
  Array<int64_t> argmax(rows.rows), target_rank({rows.rows, problem.n_targets});
  Array<float> max_logit(rows.rows), logsumexp(rows.rows), entropy(rows.rows);
  Array<float> target_logit({rows.rows, problem.n_targets});
  Array<float> top_z({rows.rows, top_k});
  Array<int64_t> top_id({rows.rows, top_k});
  const LensStats stats{argmax.mutable_data(),
                        max_logit.mutable_data(),
                        logsumexp.mutable_data(),
                        entropy.mutable_data(),
                        target_logit.mutable_data(),
                        target_rank.mutable_data(),
                        top_k,
                        top_z.mutable_data(),
                        top_id.mutable_data()};
  const LensKernels& kernels = lens_kernels(selected_isa(), rows.rows);
  {
    py::gil_scoped_release release;
    fused_lens(problem, kernels, n_threads, stats);
  }
  return py::make_tuple(argmax, max_logit, logsumexp, entropy, target_logit, target_rank, top_z, top_id);
}

void run_product_only(const py::array& x_hat, const py::array& unembedding, int n_threads) {
  const Matrix rows = as_matrix(x_hat, "x_hat"), tokens = as_matrix(unembedding, "unembedding");
  check_product(rows, tokens);
  const LensProblem problem{rows, NormSpec{}, tokens, nullptr, 1.0f, 0.0f, nullptr, 0};
  const LensKernels& kernels = lens_kernels(selected_isa(), rows.rows);
  py::gil_scoped_release release;
  product_only(problem, kernels, n_threads);
}

py::tuple run_mean_unembedding(const py::array& x_hat, const py::array& unembedding, const OptionalFloats& bias,
                               float scale, int n_threads) {
  const Matrix rows = as_matrix(x_hat, "x_hat"), tokens = as_matrix(unembedding, "unembedding");
  check_product(rows, tokens);
  const LensProblem problem{rows,  NormSpec{}, tokens,  checked(bias, "bias", tokens.rows),
                            scale, 0.0f,       nullptr, 0};
  Array<float> weights({rows.rows, rows.columns}), mean_bias(rows.rows), logsumexp(rows.rows);
  const Averages out{rows.columns, weights.mutable_data(), mean_bias.mutable_data(), logsumexp.mutable_data()};
  const LensKernels& kernels = lens_kernels(selected_isa(), rows.rows);
  {
    py::gil_scoped_release release;
    mean_unembedding(problem, kernels, n_threads, out);
  }
  return py::make_tuple(weights, mean_bias, logsumexp);
}

Array<float> run_divergence_from_first(const py::array& x_hat, const py::array& unembedding, const OptionalFloats& bias,
                                       float scale, float softcap, const Array<float>& logsumexp, int64_t group,
                                       const std::string& kind, int n_threads) {
  const Matrix rows = as_matrix(x_hat, "x_hat"), tokens = as_matrix(unembedding, "unembedding");
  check_product(rows, tokens);
  check_length(logsumexp, "logsumexp", rows.rows);
  if (group < 1 || rows.rows % group != 0)
    throw py::value_error("group: expected a divisor of " + std::to_string(rows.rows) + " rows, got " +
                          std::to_string(group));
  if (kind != "kl" && kind != "jsd") throw py::value_error("kind: expected kl or jsd, got " + kind);
  const LensProblem problem{rows,  NormSpec{}, tokens,  checked(bias, "bias", tokens.rows),
                            scale, softcap,    nullptr, 0};
  const DivergenceSpec spec{kind == "kl" ? Divergence::kullback_leibler : Divergence::jensen_shannon, group,
                            logsumexp.data()};
  Array<float> found(rows.rows);
  float* out = found.mutable_data();
  const LensKernels& kernels = lens_kernels(selected_isa(), rows.rows);
  {
    py::gil_scoped_release release;
    divergence_from_first(problem, spec, kernels, n_threads, out);
  }
  return found;
}

void bind_lens(py::module_& m) {
  m.def("instruction_set", [] { return isa_description(selected_isa()); },
        "The instruction set picked at run time; REFINELENS_ISA (baseline, v3, v4, amx) lowers it.");
  m.def("fused_lens", &run_fused_lens, py::arg("hidden"), py::arg("unembedding"), py::arg("norm"),
        py::arg("norm_weight").noconvert().none(true), py::arg("norm_bias").noconvert().none(true), py::arg("norm_eps"),
        py::arg("targets").noconvert().none(true), py::arg("bias").noconvert().none(true), py::arg("scale"),
        py::arg("softcap"), py::arg("n_threads"), py::arg("top_k") = 0,
        "(argmax, max_logit, logsumexp, entropy, target_logit, target_rank, top_z, top_id) of hidden [rows, d_model] "
        "over unembedding [vocab_size, d_model], any strides, of targets [rows, n]; softcap 0 for none; lists "
        "[rows, top_k] of z before it.");
  m.def("product_only", &run_product_only, py::arg("x_hat"), py::arg("unembedding"), py::arg("n_threads"),
        "The matrix product of fused_lens alone; its results are thrown away.");
  m.def("mean_unembedding", &run_mean_unembedding, py::arg("x_hat"), py::arg("unembedding"),
        py::arg("bias").noconvert().none(true), py::arg("scale"), py::arg("n_threads"),
        "([rows, d_model], [rows], [rows]): rows of unembedding [vocab_size, d_model] and entries of bias averaged "
        "under the softmax of scale * (x_hat . w + bias), and its logsumexp; x_hat [rows, d_model], any strides.");
  m.def("divergence_from_first", &run_divergence_from_first, py::arg("x_hat"), py::arg("unembedding"),
        py::arg("bias").noconvert().none(true), py::arg("scale"), py::arg("softcap"), py::arg("logsumexp").noconvert(),
        py::arg("group"), py::arg("kind"), py::arg("n_threads"),
        "[rows] fp32: KL(q || p) (kind kl) or Jensen-Shannon divergence (jsd) of every row's p and the q of the first "
        "of its group of neighbours; x_hat [rows, d_model] and logsumexp [rows], softcap 0 for none.");
  constexpr int64_t kManyRows = 1 << 20;
  m.def("fma_peak", [](double milliseconds) { return fma_peak(lens_kernels(selected_isa(), kManyRows), milliseconds); },
        py::arg("milliseconds"), py::call_guard<py::gil_scoped_release>(),
        "FLOP/s of one thread in multiply-adds between registers.");
}

// The certified lens.

Matrix as_weights(const py::array& unembedding) {
  const Matrix weights = as_matrix(unembedding, "unembedding");
  if (weights.rows == 0 || weights.rows > kMaxTokens || weights.columns == 0 ||
      (weights.column_stride != 1 && weights.columns != 1))
    throw py::value_error("unembedding: expected 1 to 2^31 - 1 tokens, any dimensions, and rows without gaps, got " +
                          shape_text(unembedding));
  return weights;
}

std::unique_ptr<ScreenIndex> make_index(const py::array& unembedding, int n_threads) {
  const Matrix weights = as_weights(unembedding);
  const ScreenKernels& kernels = screen_kernels(weights.columns);
  py::gil_scoped_release release;
  return std::make_unique<ScreenIndex>(weights, kernels, n_threads);
}

uint64_t run_checksum(const py::array& unembedding, int n_threads) {
  const Matrix weights = as_weights(unembedding);
  py::gil_scoped_release release;
  return checksum(weights, n_threads);
}

py::tuple run_certified_lens(const ScreenIndex& index, const Array<double>& x, const py::array& unembedding,
                             const std::optional<Array<int64_t>>& targets, const std::optional<Array<double>>& bias,
                             double scale, double softcap, bool exhaustive, int n_threads) {
  const Matrix weights = as_weights(unembedding);
  if (weights.rows != index.tokens() || weights.columns != index.depth() || x.ndim() != 2 ||
      x.shape(1) != index.depth() || x.shape(0) > std::numeric_limits<uint32_t>::max())
    throw py::value_error("x and unembedding: expected the d_model and the unembedding of the index, and fewer than "
                          "2^32 rows, got " +
                          shape_text(x) + " and " + shape_text(unembedding));
  const py::ssize_t rows = x.shape(0);
  if (targets) check_ids(*targets, "targets", "ids", rows, index.tokens());
  if (bias) check_length(*bias, "bias", index.tokens());
  Array<int64_t> argmax(rows), rank(targets ? rows : 0);
  Array<double> best(rows), logsumexp(rows), entropy(rows), target_z(targets ? rows : 0);
  Array<float> bound(rows);
  Array<bool> fell_back(rows);
  const CertifiedProblem problem{x.data(), rows,    weights, bias ? bias->data() : nullptr,
                                 scale,    softcap, targets ? targets->data() : nullptr};
  const CertifiedStats stats{argmax.mutable_data(),
                             best.mutable_data(),
                             logsumexp.mutable_data(),
                             entropy.mutable_data(),
                             bound.mutable_data(),
                             fell_back.mutable_data(),
                             targets ? target_z.mutable_data() : nullptr,
                             targets ? rank.mutable_data() : nullptr};
  {
    py::gil_scoped_release release;
    certified_lens(index, problem, stats, exhaustive, n_threads);
  }
  return py::make_tuple(argmax, best, logsumexp, entropy, target_z, rank, bound, fell_back);
}

void bind_screen(py::module_& m) {
  py::class_<ScreenIndex>(m, "ScreenIndex", "An unembedding quantised for the screen of the certified lens.")
      .def(py::init(&make_index), py::arg("unembedding"), py::arg("n_threads"))
      .def_property_readonly("finite", &ScreenIndex::finite, "Whether all weights are; if not, it cannot be used.")
      .def_property_readonly("nbytes", &ScreenIndex::bytes, "Memory it holds.")
      .def_property_readonly("kernels", [](const ScreenIndex& index) { return index.kernels().name; })
      .def("lens", &run_certified_lens, py::arg("x").noconvert(), py::arg("unembedding"),
           py::arg("targets").noconvert().none(true), py::arg("bias").noconvert().none(true), py::arg("scale"),
           py::arg("softcap"), py::arg("exhaustive"), py::arg("n_threads"),
           "argmax, z of argmax, logsumexp, entropy, target z, rank, logsumexp bound, fell back; [rows] each.");
  m.def("checksum", &run_checksum, py::arg("unembedding"), py::arg("n_threads"),
        "64 bits that nearly every change of the weights changes, the order of rows included.");
  m.def(
      "screen_kernels",
      [](int64_t depth) {
        const ScreenKernels& kernels = screen_kernels(depth);
        return py::make_tuple(kernels.name, kernels.format.digits);
      },
      py::arg("depth"), "(name, digits) of the screen that is used for an unembedding of this width.");
}

// Rankings, their agreement, and trajectories.

Rows as_ranked_rows(const py::array& a, const std::string& name) {
  const bool floating = py::isinstance<Array<double>>(a);
  if (a.ndim() != 2 || !(floating || py::isinstance<Array<int64_t>>(a)) ||
      a.shape(1) > std::numeric_limits<int32_t>::max())
    throw py::value_error(name + ": expected int64 or float64 of shape (rows, fewer than 2^31), C-contiguous, got " +
                          dtype_text(a) + " of shape " + shape_text(a));
  return {a.data(), floating, a.shape(0), a.shape(1)};
}

using Index = const Array<int64_t>&;

// make_agree(n) gives what compares two rankings of length n.
template <typename MakeAgree>
Array<double> compare(const py::array& a, Index a_index, const py::array& b, Index b_index, MakeAgree make_agree) {
  const Rows rows_a = as_ranked_rows(a, "a"), rows_b = as_ranked_rows(b, "b");
  if (rows_a.length != rows_b.length)
    throw py::value_error("a and b: expected rows of one length, got " + std::to_string(rows_a.length) + " and " +
                          std::to_string(rows_b.length));
  const py::ssize_t pairs = a_index.size();
  check_ids(a_index, "a_index", "rows", pairs, rows_a.count);
  check_ids(b_index, "b_index", "rows", pairs, rows_b.count);
  Array<double> out(pairs);
  const int64_t *in_a = a_index.data(), *in_b = b_index.data();
  double* results = out.mutable_data();
  {
    py::gil_scoped_release release;
    compare_rows(rows_a, in_a, rows_b, in_b, pairs, make_agree(rows_a.length), results);
  }
  return out;
}

Array<double> run_spearman(const py::array& a, Index a_index, const py::array& b, Index b_index) {
  return compare(a, a_index, b, b_index, [](int64_t) { return &spearman; });
}

Array<double> run_kendall_tau_b(const py::array& a, Index a_index, const py::array& b, Index b_index) {
  return compare(a, a_index, b, b_index, [](int64_t n) { return KendallTauB(n); });
}

Array<double> run_top_k_overlap(const py::array& a, Index a_index, const py::array& b, Index b_index, int64_t k) {
  if (a.ndim() != 2 || k < 1 || k > a.shape(1))
    throw py::value_error("k: expected 1 to the length of a row, got " + std::to_string(k) + " for shape " +
                          shape_text(a));
  return compare(a, a_index, b, b_index, [k](int64_t n) { return TopKOverlap(n, k); });
}

py::tuple run_summarise_trajectories(const Array<int64_t>& ranks, int64_t k) {
  if (ranks.ndim() == 0 || ranks.shape(ranks.ndim() - 1) == 0)
    throw py::value_error("ranks: expected shape (..., n_layers + 1), got " + shape_text(ranks));
  const py::ssize_t n_points = ranks.shape(ranks.ndim() - 1), n = ranks.size() / n_points;
  const std::vector<py::ssize_t> shape(ranks.shape(), ranks.shape() + ranks.ndim() - 1);
  Array<int64_t> first_correct(shape), settle(shape), flips(shape), largest_gain(shape);
  const int64_t* in = ranks.data();
  const TrajectoryColumns out{first_correct.mutable_data(), settle.mutable_data(), flips.mutable_data(),
                              largest_gain.mutable_data()};
  int64_t negative;
  {
    py::gil_scoped_release release;
    negative = summarise_trajectories(in, n, n_points, k, out);
  }
  if (negative >= 0)
    throw py::value_error("ranks: expected 0 or more, got " + std::to_string(in[negative]) +
                          "; leave out the examples that have no rank");
  return py::make_tuple(first_correct, settle, flips, largest_gain);
}

void bind_ranks(py::module_& m) {
  const auto a = py::arg("a"), b = py::arg("b");
  const auto a_index = py::arg("a_index").noconvert(), b_index = py::arg("b_index").noconvert();
  m.def("spearman", &run_spearman, a, a_index, b, b_index,
        "Spearman's rho, [pairs] fp64, of rows a[a_index] and b[b_index], both [rows, n] of int64 or fp64.");
  m.def("kendall_tau_b", &run_kendall_tau_b, a, a_index, b, b_index, "Kendall's tau-b, as spearman.");
  m.def("top_k_overlap", &run_top_k_overlap, a, a_index, b, b_index, py::arg("k"),
        "Share of the k smallest entries of one row among those of the other, as spearman.");
  m.def("summarise_trajectories", &run_summarise_trajectories, py::arg("ranks").noconvert(), py::arg("k"),
        "First-correct, settle, flips and largest gain, [...] int64 each, of ranks [..., n_layers + 1]; -1 for none.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ half of refinelens: the fused lens on a CPU, rank trajectories and their agreement.";
  bind_lens(m);
  bind_ranks(m);
  bind_screen(m);
}

}  // namespace refinelens
