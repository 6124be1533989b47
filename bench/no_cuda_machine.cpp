// Benchmarks built without CUDA.
#include "check.h"
#include "cuda_machine.h"

namespace gptoss::bench {

CudaLimits measure_cuda(int) { FAIL("this benchmark was built without CUDA"); }
Buffer card_memory(int, size_t) { FAIL("this benchmark was built without CUDA"); }
void fill_random_on_card(const Buffer&, size_t, RandomBits, uint64_t) { FAIL("this benchmark was built without CUDA"); }

}  // namespace gptoss::bench
