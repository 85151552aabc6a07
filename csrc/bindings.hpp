// What the files of Python bindings share. Shapes and dtypes are checked in the bindings, so that everything else may
// trust its pointers.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

namespace refinelens {

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

inline std::string shape_text(const pybind11::array& a) {
  return pybind11::str(a.attr("shape")).cast<std::string>();
}

inline void check_length(const pybind11::array& a, const char* name, pybind11::ssize_t expected) {
  if (a.ndim() != 1 || a.shape(0) != expected)
    throw pybind11::value_error(std::string(name) + ": expected shape (" + std::to_string(expected) + ",), got " +
                                shape_text(a));
}

void bind_lens(pybind11::module_& m);

}  // namespace refinelens
