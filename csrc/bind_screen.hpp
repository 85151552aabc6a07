#pragma once

#include <pybind11/pybind11.h>

namespace refinelens {

void bind_screen(pybind11::module_& m);

}  // namespace refinelens
