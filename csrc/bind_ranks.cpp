// Python bindings of rankings and their agreement: shapes and dtypes are checked here.
#include <limits>
#include <string>

#include "bindings.hpp"
#include "rank_agreement.hpp"

namespace py = pybind11;

namespace refinelens {

namespace {

Rows as_ranked_rows(const py::array& a, const char* name) {
  const bool floating = py::isinstance<Array<double>>(a);
  if (a.ndim() != 2 || !(floating || py::isinstance<Array<int64_t>>(a)) ||
      a.shape(1) > std::numeric_limits<int32_t>::max())
    throw py::value_error(std::string(name) +
                          ": expected int64 or float64 of shape (rows, fewer than 2^31), C-contiguous, got " +
                          py::str(a.dtype()).cast<std::string>() + " of shape " + shape_text(a));
  return {a.data(), floating, a.shape(0), a.shape(1)};
}

void check_index(const Array<int64_t>& index, const char* name, py::ssize_t pairs, int64_t rows) {
  check_length(index, name, pairs);
  for (py::ssize_t i = 0; i < pairs; ++i)
    if (index.at(i) < 0 || index.at(i) >= rows)
      throw py::value_error(std::string(name) + ": expected rows below " + std::to_string(rows) + ", got " +
                            std::to_string(index.at(i)));
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
  check_index(a_index, "a_index", pairs, rows_a.count);
  check_index(b_index, "b_index", pairs, rows_b.count);
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

}  // namespace

void bind_ranks(py::module_& m) {
  const auto a = py::arg("a"), b = py::arg("b");
  const auto a_index = py::arg("a_index").noconvert(), b_index = py::arg("b_index").noconvert();
  m.def("spearman", &run_spearman, a, a_index, b, b_index,
        "Spearman's rho, [pairs] fp64, of rows a[a_index] and b[b_index], both [rows, n] of int64 or fp64.");
  m.def("kendall_tau_b", &run_kendall_tau_b, a, a_index, b, b_index, "Kendall's tau-b, as spearman.");
  m.def("top_k_overlap", &run_top_k_overlap, a, a_index, b, b_index, py::arg("k"),
        "Share of the k smallest entries of one row among those of the other, as spearman.");
}

}  // namespace refinelens
