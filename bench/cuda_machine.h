// What this card can do: the limits that every row of bench_ops_cuda and bench_forward is set against, measured in the same
// run. And random weights, made where they are used.
#pragma once
#include "random_bits.h"
#include "tensor.h"

namespace gptoss::bench {

struct CudaLimits {
  double bytes_per_second = 0;  // reading memory far larger than the second-level cache
  double dot_flops = 0;  // bfloat16 products (wgmma or mma.sync), sums in float32; a multiplication and its addition are two
};

// The best of a few passes.
CudaLimits measure_cuda(int device);

Buffer card_memory(int device, size_t bytes);
// Fills it as fill_random() does on the host, though with other numbers. Waits for all that the card does, before and after.
void fill_random_on_card(const Buffer& buffer, size_t bytes, RandomBits bits, uint64_t seed);

// "cuda" is device 0.
inline int card_of(const std::string& device) { return device.size() > 5 ? std::stoi(device.substr(5)) : 0; }

}  // namespace gptoss::bench
