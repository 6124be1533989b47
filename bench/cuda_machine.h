// What this card can do: the limits that every row of bench_ops_cuda and bench_forward is set against, measured in the same
// run.
#pragma once

namespace gptoss::bench {

struct CudaLimits {
  double bytes_per_second = 0;  // reading memory far larger than the second-level cache
  double dot_flops = 0;         // bfloat16 products by mma.sync, sums in float32; a multiplication and its addition are two
};

// The best of a few passes.
CudaLimits measure_cuda(int device);

}  // namespace gptoss::bench
