// Zero-filled memory straight from the system, in huge pages where it can be: weights are streams of gigabytes.
#pragma once
#include "tensor.h"

namespace gptoss::cpu {

// Memory becomes resident as it is touched. Throws std::bad_alloc-like errors as FAIL with the number of bytes.
Buffer allocate_pages(size_t bytes);

// What the machine (or the cgroup) could still give this process.
size_t available_memory();

}  // namespace gptoss::cpu
