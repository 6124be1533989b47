#pragma once
#include <pybind11/pybind11.h>

namespace gptoss {

void bind_ops(pybind11::module_& m);  // ops.cpp

}  // namespace gptoss
