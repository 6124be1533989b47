// A block of 1024 threads finds places by weight: the first of a row of places at which the weights, added up, exceed a target
// (find), and the logit at which those of all better ones do (select, by a histogram of the logits' bits over a range, then of
// one bin of it, until a bin holds one value). Weights are integers, so no order of adding matters. All threads call these
// together, with the same target, and get the same result.
#pragma once
#include "cuda/common.cuh"

namespace gptoss::cuda {

using Mass = unsigned long long;

inline constexpr int kSelectThreads = 1024, kSelectWarps = kSelectThreads / kWarp;
inline constexpr int kBinBits = 11, kBins = 1 << kBinBits;
static_assert(kSelectWarps == kWarp, "a warp reads a value of each warp");

struct SelectMemory {
  uint32_t low[kBins], high[kBins];  // halves of the weight of a bin: shared memory adds 32 bits at a time
  uint32_t count[kBins];             // its elements
  Mass parts[kSelectWarps];
  Mass rest;
  int found;
};

template <class T, class Op>
__device__ __forceinline__ T block_reduce(T value, T* parts, const Op& op) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, mask));
  __syncthreads();  // what was there may still be read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = parts[threadIdx.x % kWarp];
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, mask));
  return value;
}

__device__ __forceinline__ Mass block_sum(Mass value, SelectMemory& shared) {
  return block_reduce(value, shared.parts, [](Mass a, Mass b) { return a + b; });
}

__device__ __forceinline__ Mass warp_scan(Mass value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const Mass before = __shfl_up_sync(kAllLanes, value, delta);
    if (lane >= delta) value += before;
  }
  return value;
}

// The sum of the values up to this thread's, and of all.
__device__ __forceinline__ Mass block_scan(Mass& total, Mass value, SelectMemory& shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  value = warp_scan(value);
  __syncthreads();
  if (threadIdx.x % kWarp == kWarp - 1) shared.parts[warp] = value;
  __syncthreads();
  const Mass parts = warp_scan(shared.parts[threadIdx.x % kWarp]);
  total = __shfl_sync(kAllLanes, parts, kWarp - 1);
  const Mass before = __shfl_sync(kAllLanes, parts, warp == 0 ? 0 : warp - 1);
  return warp == 0 ? value : value + before;
}

// The first of n places whose weight, added to those before it, is over `target`, of which the weights before it are taken off.
// -1 if there is none.
template <class Weight>
__device__ __forceinline__ int find(Mass& target, int n, SelectMemory& shared, const Weight& weight) {
  for (int first = 0; first < n; first += kSelectThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    const Mass w = i < n ? weight(i) : 0;
    Mass total;
    const Mass end = block_scan(total, w, shared);
    if (target >= total) {
      target -= total;
      continue;
    }
    if (end > target && end - w <= target) {
      shared.found = i;
      shared.rest = target - (end - w);
    }
    __syncthreads();
    target = shared.rest;
    return shared.found;
  }
  return -1;
}

// Ordered as the logits are; -0 is 0.
__device__ __forceinline__ uint32_t key_of(float logit) {
  const uint32_t bits = __float_as_uint(logit + 0.f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

struct Selected {
  bool found;
  uint32_t key;
  uint32_t count;  // elements of this key, or 1: the only one from the key up to those known to be better
  Mass rest;       // of the target, after all better elements
};

// The key at which the weights of elements with keys from low to high, best first, first exceed `target`.
template <class Each, class Weight>
__device__ Selected select(Mass target, uint32_t low, uint32_t high, SelectMemory& shared, const Each& each,
                           const Weight& weight) {
  for (;;) {
    const int bits = 32 - __clz(static_cast<int>(high - low)), shift = bits > kBinBits ? bits - kBinBits : 0;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kSelectThreads)
      shared.low[i] = shared.high[i] = shared.count[i] = 0;
    __syncthreads();
    each([&](float logit) {
      const uint32_t key = key_of(logit);
      if (key < low || key > high) return;
      const Mass w = weight(logit);
      if (w == 0) return;
      const uint32_t bin = (high - key) >> shift, low_half = static_cast<uint32_t>(w);
      const uint32_t before = atomicAdd(&shared.low[bin], low_half);
      const uint32_t high_half = static_cast<uint32_t>(w >> 32) + (before + low_half < before);
      if (high_half) atomicAdd(&shared.high[bin], high_half);
      atomicAdd(&shared.count[bin], 1u);
    });
    __syncthreads();
    const int bin = find(target, kBins, shared, [&](int i) { return Mass{shared.high[i]} << 32 | shared.low[i]; });
    if (bin < 0) return {false, 0, 0, 0};
    const uint32_t count = shared.count[bin];
    __syncthreads();
    high -= static_cast<uint32_t>(bin) << shift;
    const uint32_t width = (1u << shift) - 1;
    if (high - low > width) low = high - width;
    if (count == 1 || shift == 0) return {true, low, count, target};
  }
}

}  // namespace gptoss::cuda
