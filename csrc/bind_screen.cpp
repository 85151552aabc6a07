// Python bindings of the certified lens: shapes and dtypes are checked here.
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "bindings.hpp"
#include "checksum.hpp"
#include "screen.hpp"

namespace py = pybind11;

namespace refinelens {

namespace {

Matrix as_weights(const py::array& unembedding) {
  const Matrix weights = as_matrix(unembedding, "unembedding");
  if (weights.rows == 0 || weights.rows > std::numeric_limits<int32_t>::max() || weights.columns == 0 ||
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

uint64_t checksum_of(const py::array& unembedding, int n_threads) {
  const Matrix weights = as_weights(unembedding);
  py::gil_scoped_release release;
  return checksum(weights, n_threads);
}

py::tuple lens(const ScreenIndex& index, const Array<double>& x, const py::array& unembedding,
               std::optional<Array<int64_t>> targets, std::optional<Array<double>> bias, double scale, double softcap,
               bool exhaustive, int n_threads) {
  const Matrix weights = as_weights(unembedding);
  if (weights.rows != index.tokens() || weights.columns != index.depth() || x.ndim() != 2 ||
      x.shape(1) != index.depth() || x.shape(0) > std::numeric_limits<uint32_t>::max())
    throw py::value_error("x and unembedding: expected the d_model and the unembedding of the index, and fewer than "
                          "2^32 rows, got " +
                          shape_text(x) + " and " + shape_text(unembedding));
  const py::ssize_t rows = x.shape(0);
  if (targets) check_targets(*targets, rows, index.tokens());
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

}  // namespace

void bind_screen(py::module_& m) {
  py::class_<ScreenIndex>(m, "ScreenIndex", "An unembedding quantised for the screen of the certified lens.")
      .def(py::init(&make_index), py::arg("unembedding"), py::arg("n_threads"))
      .def_property_readonly("finite", &ScreenIndex::finite, "Whether all weights are; if not, it cannot be used.")
      .def_property_readonly("nbytes", &ScreenIndex::bytes, "Memory it holds.")
      .def_property_readonly("kernels", [](const ScreenIndex& index) { return index.kernels().name; })
      .def("lens", &lens, py::arg("x").noconvert(), py::arg("unembedding"),
           py::arg("targets").noconvert().none(true), py::arg("bias").noconvert().none(true), py::arg("scale"),
           py::arg("softcap"), py::arg("exhaustive"), py::arg("n_threads"),
           "argmax, z of argmax, logsumexp, entropy, target z, rank, logsumexp bound, fell back; [rows] each.");
  m.def("checksum", &checksum_of, py::arg("unembedding"), py::arg("n_threads"),
        "64 bits that nearly every change of the weights changes, the order of rows included.");
  m.def(
      "screen_kernels",
      [](int64_t depth) {
        const ScreenKernels& kernels = screen_kernels(depth);
        return py::make_tuple(kernels.name, kernels.format.digits);
      },
      py::arg("depth"), "(name, digits) of the screen that is used for an unembedding of this width.");
}

}  // namespace refinelens
