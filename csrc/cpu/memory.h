// Zero-filled memory straight from the system, in huge pages where it can be: weights are streams of gigabytes.
#pragma once
#include "tensor.h"

namespace gptoss::cpu {

// Memory becomes resident as it is touched. Throws with the number of bytes where the system has none to give.
Buffer allocate_pages(size_t bytes);

// What the machine (or the cgroup) could still give this process.
size_t available_memory();

}  // namespace gptoss::cpu
