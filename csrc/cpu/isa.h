// Which instruction sets this build has kernels for, which of them this machine runs, and which one is used.
#pragma once
#include <string>
#include <vector>

#include "cpu/kernel_table.h"

namespace gptoss::cpu {

std::vector<std::string> isa_names();       // in this build, plainest first
std::vector<std::string> supported_isas();  // of those, what the processor and the operating system run

// The kernels of `name`; if empty, of the environment's GPTOSS_ISA; if that is not set, of the best set supported.
// An unknown or unsupported name throws and lists the possible ones.
const KernelTable& select_kernels(const std::string& name);

}  // namespace gptoss::cpu
