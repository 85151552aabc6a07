// What the files of Python bindings share. Shapes and dtypes are checked in the bindings, so that everything else may
// trust its pointers.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "lens_kernels.hpp"

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

inline void check_targets(const Array<int64_t>& targets, pybind11::ssize_t rows, int64_t vocab_size) {
  check_length(targets, "targets", rows);
  for (pybind11::ssize_t i = 0; i < rows; ++i)
    if (targets.at(i) < 0 || targets.at(i) >= vocab_size)
      throw pybind11::value_error("targets: expected ids below " + std::to_string(vocab_size) + ", got " +
                                  std::to_string(targets.at(i)));
}

// The dtype tells the elements: float32, float16, or uint16 for the bits of bf16, which numpy does not have.
inline Matrix as_matrix(const pybind11::array& a, const char* name) {
  if (a.ndim() != 2)
    throw pybind11::value_error(std::string(name) + ": expected two dimensions, got shape " + shape_text(a));
  const char kind = a.dtype().kind();
  const pybind11::ssize_t size = a.itemsize();
  if (!(kind == 'f' && (size == 4 || size == 2)) && !(kind == 'u' && size == 2))
    throw pybind11::value_error(std::string(name) + ": expected float32, float16 or uint16 (the bits of bf16), got " +
                                pybind11::str(a.dtype()).cast<std::string>());
  const Element element = size == 4 ? Element::fp32 : kind == 'f' ? Element::fp16 : Element::bf16;
  return {a.data(), element, a.shape(0), a.shape(1), a.strides(0) / size, a.strides(1) / size};
}

void bind_lens(pybind11::module_& m);
void bind_ranks(pybind11::module_& m);
void bind_screen(pybind11::module_& m);

}  // namespace refinelens
