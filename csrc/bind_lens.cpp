#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "bindings.hpp"
#include "dispatch.hpp"
#include "fused_lens.hpp"

namespace py = pybind11;

namespace refinelens {

namespace {

using OptionalFloats = std::optional<Array<float>>;

const float* checked(const OptionalFloats& a, const char* name, int64_t length) {
  if (!a) return nullptr;
  check_length(*a, name, length);
  return a->data();
}

void check_product(const Matrix& hidden, const Matrix& unembedding) {
  if (hidden.columns != unembedding.columns || hidden.columns == 0 || unembedding.rows == 0 ||
      unembedding.rows > std::numeric_limits<int32_t>::max())
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

py::tuple run_fused_lens(py::array hidden, py::array unembedding, const std::string& norm, OptionalFloats norm_weight,
                         OptionalFloats norm_bias, double norm_eps, std::optional<Array<int64_t>> targets,
                         OptionalFloats bias, float scale, float softcap, int n_threads) {
  const Matrix rows = as_matrix(hidden, "hidden"), tokens = as_matrix(unembedding, "unembedding");
  check_product(rows, tokens);
  const NormSpec spec{norm_kind(norm), checked(norm_weight, "norm_weight", rows.columns),
                      checked(norm_bias, "norm_bias", rows.columns), norm_eps};
  if (targets) check_targets(*targets, rows.rows, tokens.rows);
  const LensProblem problem{rows,  spec,  tokens, checked(bias, "bias", tokens.rows),
                            scale, softcap, targets ? targets->data() : nullptr};
  Array<int64_t> argmax(rows.rows), target_rank(targets ? rows.rows : 0);
  Array<float> max_logit(rows.rows), logsumexp(rows.rows), entropy(rows.rows), target_logit(targets ? rows.rows : 0);
  const LensStats stats{argmax.mutable_data(),
                        max_logit.mutable_data(),
                        logsumexp.mutable_data(),
                        entropy.mutable_data(),
                        targets ? target_logit.mutable_data() : nullptr,
                        targets ? target_rank.mutable_data() : nullptr};
  const LensKernels& kernels = lens_kernels(picked_isa());
  {
    py::gil_scoped_release release;
    fused_lens(problem, kernels, n_threads, stats);
  }
  if (!targets) return py::make_tuple(argmax, max_logit, logsumexp, entropy, py::none(), py::none());
  return py::make_tuple(argmax, max_logit, logsumexp, entropy, target_logit, target_rank);
}

void run_product_only(py::array x_hat, py::array unembedding, int n_threads) {
  const Matrix rows = as_matrix(x_hat, "x_hat"), tokens = as_matrix(unembedding, "unembedding");
  check_product(rows, tokens);
  const LensProblem problem{rows, NormSpec{}, tokens, nullptr, 1.0f, 0.0f, nullptr};
  const LensKernels& kernels = lens_kernels(picked_isa());
  py::gil_scoped_release release;
  product_only(problem, kernels, n_threads);
}

}  // namespace

void bind_lens(py::module_& m) {
  m.def("instruction_set", [] { return isa_description(picked_isa()); },
        "The instruction set picked at run time; REFINELENS_ISA (baseline, v3, v4, amx) lowers it.");
  m.def("fused_lens", &run_fused_lens, py::arg("hidden"), py::arg("unembedding"), py::arg("norm"),
        py::arg("norm_weight").noconvert().none(true), py::arg("norm_bias").noconvert().none(true), py::arg("norm_eps"),
        py::arg("targets").noconvert().none(true), py::arg("bias").noconvert().none(true), py::arg("scale"),
        py::arg("softcap"), py::arg("n_threads"),
        "(argmax, max_logit, logsumexp, entropy, target_logit, target_rank) of hidden [rows, d_model] over unembedding "
        "[vocab_size, d_model], any strides; softcap 0 for none.");
  m.def("product_only", &run_product_only, py::arg("x_hat"), py::arg("unembedding"), py::arg("n_threads"),
        "The matrix product of fused_lens alone; its results are thrown away.");
  m.def("fma_peak", [](double milliseconds) { return fma_peak(lens_kernels(picked_isa()), milliseconds); },
        py::arg("milliseconds"), py::call_guard<py::gil_scoped_release>(),
        "FLOP/s of one thread in multiply-adds between registers.");
}

}  // namespace refinelens
