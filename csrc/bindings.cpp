// The Python module: trajectories, and what the other binding files register.
#include "bindings.hpp"

#include <vector>

#include "trajectory.hpp"

namespace py = pybind11;

namespace refinelens {

namespace {

py::tuple run_summarise_trajectories(Array<int64_t> ranks, int64_t k) {
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ half of refinelens: the fused lens on a CPU, rank trajectories and their agreement.";
  bind_lens(m);
  bind_ranks(m);
  bind_screen(m);
  m.def("summarise_trajectories", &run_summarise_trajectories, py::arg("ranks").noconvert(), py::arg("k"),
        "First-correct, settle, flips and largest gain, [...] int64 each, of ranks [..., n_layers + 1]; -1 for none.");
}

}  // namespace refinelens
