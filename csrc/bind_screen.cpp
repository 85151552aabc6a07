// Python bindings of the certified lens: shapes and dtypes are checked here.
#include "bind_screen.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "screen.hpp"

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

namespace refinelens {

namespace {

void check_shape(const py::array& a, const char* name, std::vector<py::ssize_t> expected) {
  const std::vector<py::ssize_t> got(a.shape(), a.shape() + a.ndim());
  if (got != expected)
    throw py::value_error(std::string(name) + ": expected shape " + py::repr(py::cast(expected)).cast<std::string>() +
                          ", got " + py::repr(py::cast(got)).cast<std::string>());
}

Weights as_weights(const py::array& unembedding, bool bf16) {
  if (unembedding.ndim() != 2 || !(unembedding.flags() & py::array::c_style))
    throw py::value_error("unembedding: expected a contiguous array of shape (vocab_size, d_model)");
  const bool wide = py::isinstance<py::array_t<float>>(unembedding);
  if (!wide && !py::isinstance<py::array_t<uint16_t>>(unembedding))
    throw py::value_error("unembedding: expected float32, or uint16 with the bits of float16 or bfloat16");
  return {unembedding.data(), wide ? Element::fp32 : bf16 ? Element::bf16 : Element::fp16, unembedding.shape(0),
          unembedding.shape(1)};
}

std::unique_ptr<ScreenIndex> make_index(const py::array& unembedding, bool bf16, int n_threads) {
  const Weights weights = as_weights(unembedding, bf16);
  const ScreenKernels& kernels = screen_kernels(weights.depth);
  py::gil_scoped_release release;
  return std::make_unique<ScreenIndex>(weights, kernels, n_threads);
}

py::tuple lens(const ScreenIndex& index, const Array<double>& x, const py::array& unembedding, bool bf16,
               std::optional<Array<int64_t>> targets, std::optional<Array<double>> bias, double scale, double softcap,
               int n_threads) {
  const Weights weights = as_weights(unembedding, bf16);
  const py::ssize_t rows = x.ndim() ? x.shape(0) : 0;
  check_shape(unembedding, "unembedding", {index.tokens(), index.depth()});
  check_shape(x, "x", {rows, index.depth()});
  if (targets) check_shape(*targets, "targets", {rows});
  if (bias) check_shape(*bias, "bias", {index.tokens()});
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
    certified_lens(index, problem, stats, n_threads);
  }
  return py::make_tuple(argmax, best, logsumexp, entropy, target_z, rank, bound, fell_back);
}

}  // namespace

void bind_screen(py::module_& m) {
  py::class_<ScreenIndex>(m, "ScreenIndex", "An unembedding quantised for the screen of the certified lens.")
      .def(py::init(&make_index), py::arg("unembedding").noconvert(), py::arg("bf16"), py::arg("n_threads"))
      .def_property_readonly("finite", &ScreenIndex::finite, "Whether all weights are; if not, it cannot be used.")
      .def_property_readonly("nbytes", &ScreenIndex::bytes, "Memory it holds.")
      .def_property_readonly("kernels", [](const ScreenIndex& index) { return index.kernels().name; })
      .def("lens", &lens, py::arg("x").noconvert(), py::arg("unembedding").noconvert(), py::arg("bf16"),
           py::arg("targets").noconvert().none(true), py::arg("bias").noconvert().none(true), py::arg("scale"),
           py::arg("softcap"), py::arg("n_threads"),
           "argmax, z of argmax, logsumexp, entropy, target z, rank, logsumexp bound, fell back; [rows] each.");
  m.def("screen_kernels", [](int64_t depth) { return screen_kernels(depth).name; }, py::arg("depth"),
        "The screen that would be used for an unembedding of this width.");
}

}  // namespace refinelens
