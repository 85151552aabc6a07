// Python bindings: shapes and dtypes are checked here, so that the headers may trust their pointers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "dispatch.hpp"
#include "tile_stats.hpp"
#include "trajectory.hpp"

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

namespace {

std::string shape_text(const py::array& a) { return py::str(a.attr("shape")).cast<std::string>(); }

void check_length(const py::array& a, const char* name, py::ssize_t expected) {
  if (a.ndim() != 1 || a.shape(0) != expected)
    throw py::value_error(std::string(name) + ": expected shape (" + std::to_string(expected) + ",), got " +
                          shape_text(a));
}

void reduce_tile(Array<float> dots, int64_t columns, int64_t first_id, std::optional<Array<float>> bias,
                 float scale, float softcap, Array<float> best, Array<int64_t> argmax, Array<float> peak,
                 Array<double> total, Array<double> weighted, std::optional<Array<float>> t_z,
                 std::optional<Array<int64_t>> target, std::optional<Array<int64_t>> rank, int n_threads) {
  if (dots.ndim() != 2 || columns < 0 || columns > dots.shape(1))
    throw py::value_error("dots: expected shape (rows, at least " + std::to_string(columns) + "), got " +
                          shape_text(dots));
  const py::ssize_t n_rows = dots.shape(0);
  check_length(best, "best", n_rows);
  check_length(argmax, "argmax", n_rows);
  check_length(peak, "peak", n_rows);
  check_length(total, "total", n_rows);
  check_length(weighted, "weighted", n_rows);
  if (bias) check_length(*bias, "bias", columns);
  if (target.has_value() != t_z.has_value() || target.has_value() != rank.has_value())
    throw py::value_error("t_z, target and rank: expected all or none of them");
  if (target) {
    check_length(*t_z, "t_z", n_rows);
    check_length(*target, "target", n_rows);
    check_length(*rank, "rank", n_rows);
  }
  const refinelens::Tile tile{dots.mutable_data(), dots.shape(1), columns, first_id,
                              bias ? bias->data() : nullptr, scale, softcap};
  const refinelens::RowState rows{best.mutable_data(),
                                  argmax.mutable_data(),
                                  peak.mutable_data(),
                                  total.mutable_data(),
                                  weighted.mutable_data(),
                                  target ? t_z->data() : nullptr,
                                  target ? target->data() : nullptr,
                                  target ? rank->mutable_data() : nullptr};
  py::gil_scoped_release release;
  refinelens::reduce_tile(tile, rows, n_rows, n_threads);
}

py::tuple summarise_trajectories(Array<int64_t> ranks, int64_t k) {
  if (ranks.ndim() != 2)
    throw py::value_error("ranks: expected shape (examples, n_layers + 1), got " + shape_text(ranks));
  const py::ssize_t n = ranks.shape(0);
  Array<int64_t> first_correct(n), settle(n), flips(n);
  const int64_t* in = ranks.data();
  int64_t *first = first_correct.mutable_data(), *settled = settle.mutable_data(), *changes = flips.mutable_data();
  {
    py::gil_scoped_release release;
    refinelens::summarise_trajectories(in, n, ranks.shape(1), k, first, settled, changes);
  }
  return py::make_tuple(first_correct, settle, flips);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ half of refinelens: the reduction of tiles of logits, and rank trajectories.";
  m.def("instruction_set", [] { return refinelens::isa_description(refinelens::picked_isa()); },
        "The instruction set picked at run time; REFINELENS_ISA (baseline, v3, v4) lowers it.");
  m.def("reduce_tile", &reduce_tile, py::arg("dots").noconvert(), py::arg("columns"), py::arg("first_id"),
        py::arg("bias").noconvert().none(true), py::arg("scale"), py::arg("softcap"), py::arg("best").noconvert(),
        py::arg("argmax").noconvert(), py::arg("peak").noconvert(), py::arg("total").noconvert(),
        py::arg("weighted").noconvert(), py::arg("t_z").noconvert().none(true),
        py::arg("target").noconvert().none(true), py::arg("rank").noconvert().none(true), py::arg("n_threads"),
        "Fold one tile of logits, [rows, columns] fp32 and overwritten, into the row statistics in place.");
  m.def("summarise_trajectories", &summarise_trajectories, py::arg("ranks").noconvert(), py::arg("k"),
        "First-correct, settle and flips, [examples] int64 each, of ranks [examples, n_layers + 1]; -1 for none.");
}
