// The limits of a card: memory, read 16 bytes a lane by every multiprocessor; and products: mma.sync, independent chains in
// registers, and on sm_90 wgmma, 64 x 128 x 16 at a time by two warpgroups of every multiprocessor.
#include "cuda_machine.h"

#include <algorithm>
#include <chrono>

#include "cuda/hopper.cuh"
#include "cuda/memory.h"

namespace gptoss::bench {
namespace {

using namespace gptoss::cuda;

constexpr int kThreads = 512, kLoads = 8, kChains = 8;
constexpr int kWgmmaShared = 128 * 64 * 2 + 1024;  // and room to align it
#ifdef GPTOSS_CUDA_EMULATE
constexpr bool kSmall = true;  // a pass of milliseconds, to see that it runs
#else
constexpr bool kSmall = false;
#endif

// Each block reads its own part from one end to the other, kLoads x 16 bytes a thread at a time.
__global__ void __launch_bounds__(kThreads) read_kernel(uint32_t* sink, const uint4* data, int64_t vectors_a_block) {
  wait_for_previous();
  const uint4* from = data + static_cast<int64_t>(blockIdx.x) * vectors_a_block + threadIdx.x;
  uint32_t sum = 0;
  for (int64_t i = 0; i < vectors_a_block; i += kThreads * kLoads) {
    uint4 v[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) v[j] = load_once(from + i + j * kThreads);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (sum == 0x12345678u) *sink = sum;  // the memory is zero: never
}

__global__ void __launch_bounds__(256) mma_kernel(float* sink, int rounds) {
  wait_for_previous();
  const uint32_t one = 0x3f803f80u + (threadIdx.x & 1);
  FragmentC sums[kChains];
#pragma unroll
  for (int i = 0; i < kChains; ++i) sums[i] = {{0, 0, 0, 0}};
  for (int r = 0; r < rounds; ++r) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) mma(sums[i], {one, one, one, one}, {one, one});
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < kChains; ++i) total += sums[i].v[0] + sums[i].v[3];
  if (total < 0) *sink = total;
}

// B is 128 tokens x 64 inputs of shared memory, all zero.
__global__ void __launch_bounds__(256, 1) wgmma_kernel([[maybe_unused]] float* sink, [[maybe_unused]] int rounds) {
  wait_for_previous();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  uint32_t* tokens = shared_memory<uint32_t>();
  for (int i = static_cast<int>(threadIdx.x); i < kWgmmaShared / 4; i += 256) tokens[i] = 0;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads what these threads wrote
  __syncthreads();
  const uint32_t start = (shared_address(tokens) + 1023) / 1024 * 1024,
                 one[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
  float sums[64] = {};
  for (int r = 0; r < rounds; ++r) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kChains; ++i) wgmma<128>(sums, one, operand_b(start, i % 4));
    wgmma_commit();
    wgmma_wait<0>();
  }
  settle(sums);
  float total = 0;
  for (float sum : sums) total += sum;
  if (total < 0) *sink = total;
#endif
}

// xorshift64 (Marsaglia 2003), 16 words a thread: a thread's words are not far apart, threads' starts are.
constexpr int kWords = 16;
__global__ void __launch_bounds__(kThreads) fill_kernel(uint64_t* data, int64_t words, RandomBits bits, uint64_t seed) {
  wait_for_previous();
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWords;
  uint64_t x = (seed << 40) + static_cast<uint64_t>(first) + 1;
  for (int i = 0; i < 3; ++i) x = (x ^ x >> 29) * 0x2545F4914F6CDD1D;
  for (int64_t i = first; i < first + kWords && i < words; ++i) {
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    data[i] = (x & bits.mask) + bits.base;
  }
}

template <class Pass>
double fastest(const Stream& stream, int passes, const Pass& pass) {
  double best = 1e30;
  for (int i = 0; i < passes; ++i) {
    stream.wait();
    const auto start = std::chrono::steady_clock::now();
    pass();
    stream.wait();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace

CudaLimits measure_cuda(int device) {
  CUDA_CHECK(cudaSetDevice(device));
  cudaDeviceProp properties{};
  CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  const int passes = kSmall ? 1 : 12;
  const unsigned blocks = static_cast<unsigned>(properties.multiProcessorCount) * (kSmall ? 1 : 4);
  const int64_t vectors_a_block = kThreads * kLoads * int64_t{kSmall ? 1 : 64};  // 4 MiB a block, 2 GiB on a large card
  const int rounds = kSmall ? 1 : 1 << 14;
  const Stream stream;
  const Buffer data = device_memory(vectors_a_block * blocks * 16), sink = device_memory(4);
  CUDA_CHECK(cudaMemsetAsync(data.data(), 0, data.bytes(), stream));

  CudaLimits limits;
  limits.bytes_per_second = static_cast<double>(data.bytes()) / fastest(stream, passes, [&] {
                              launch({dim3(blocks), dim3(kThreads), 0, stream}, read_kernel, sink.as<uint32_t>(),
                                     static_cast<const uint4*>(data.as<uint4>()), vectors_a_block);
                            });
  const double flops = 2.0 * 16 * 8 * 16 * kChains * rounds * (256 / kWarp) * blocks;
  limits.dot_flops = flops / fastest(stream, passes, [&] {
                       launch({dim3(blocks), dim3(256), 0, stream}, mma_kernel, sink.as<float>(), rounds);
                     });
  if (properties.major == 9 && !kSmall) {
    const double products = 2.0 * 64 * 128 * 16 * kChains * rounds * 2 * properties.multiProcessorCount;
    const double seconds = fastest(stream, passes, [&] {
      launch({dim3(static_cast<unsigned>(properties.multiProcessorCount)), dim3(256), kWgmmaShared, stream}, wgmma_kernel,
             sink.as<float>(), rounds);
    });
    limits.dot_flops = std::max(limits.dot_flops, products / seconds);
  }
  return limits;
}

Buffer card_memory(int device, size_t bytes) {
  CUDA_CHECK(cudaSetDevice(device));
  return device_memory(round_up(static_cast<int64_t>(bytes), 8));
}

void fill_random_on_card(const Buffer& buffer, size_t bytes, RandomBits bits, uint64_t seed) {
  CUDA_CHECK(cudaDeviceSynchronize());
  const int64_t words = ceil_div(static_cast<int64_t>(bytes), 8);
  launch({dim3(static_cast<unsigned>(ceil_div(words, kThreads * kWords))), dim3(kThreads)}, fill_kernel, buffer.as<uint64_t>(),
         words, bits, seed);
  CUDA_CHECK(cudaDeviceSynchronize());
}

}  // namespace gptoss::bench
