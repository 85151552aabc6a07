// The Python module: trajectories, and what the other binding files register.
#include "bindings.hpp"

#include "trajectory.hpp"

namespace py = pybind11;

namespace refinelens {

namespace {

py::tuple run_summarise_trajectories(Array<int64_t> ranks, int64_t k) {
  if (ranks.ndim() != 2)
    throw py::value_error("ranks: expected shape (examples, n_layers + 1), got " + shape_text(ranks));
  const py::ssize_t n = ranks.shape(0);
  Array<int64_t> first_correct(n), settle(n), flips(n);
  const int64_t* in = ranks.data();
  int64_t *first = first_correct.mutable_data(), *settled = settle.mutable_data(), *changes = flips.mutable_data();
  {
    py::gil_scoped_release release;
    summarise_trajectories(in, n, ranks.shape(1), k, first, settled, changes);
  }
  return py::make_tuple(first_correct, settle, flips);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ half of refinelens: the fused lens on a CPU, and rank trajectories.";
  bind_lens(m);
  bind_screen(m);
  m.def("summarise_trajectories", &run_summarise_trajectories, py::arg("ranks").noconvert(), py::arg("k"),
        "First-correct, settle and flips, [examples] int64 each, of ranks [examples, n_layers + 1]; -1 for none.");
}

}  // namespace refinelens
