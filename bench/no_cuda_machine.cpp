// Benchmarks built without CUDA.
#include "check.h"
#include "cuda_machine.h"

namespace gptoss::bench {

CudaLimits measure_cuda(int) { FAIL("this benchmark was built without CUDA"); }

}  // namespace gptoss::bench
