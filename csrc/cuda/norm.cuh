// RMSNorm of rows by a block of 256 threads: t = x / sqrt(mean(x^2) + eps) * weight. Every kernel that norms does it with these
// functions, so that a row has the same bits in all of them: a thread adds the squares of its elements (4 of every 1024), lanes
// are added by halves, and the 8 warps in order.
//   square_sums<1>(sums, x, n, hidden);  __syncthreads();  each_normed(sums, x, n, hidden, weight, eps, each);
#pragma once
#include "cuda/common.cuh"

namespace gptoss::cuda {

struct NormBlock {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;
};

// sums: [n, warps], shared    x: [n, hidden]    kRows: of which loads are in flight, where registers are left for them
template <int kRows>
__device__ __forceinline__ void square_sums(float* sums, const float* x, int n, int hidden) {
  constexpr int kLoads = 3, kThreads = NormBlock::kThreads;
  const int thread = static_cast<int>(threadIdx.x), quads = hidden / 4;
  for (int row = 0; row < n; row += kRows) {
    float sum[kRows] = {};
    for (int first = thread; first < quads; first += kLoads * kThreads) {
      float4 v[kRows][kLoads];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4* in = reinterpret_cast<const float4*>(x + static_cast<int64_t>(row + r) * hidden);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int at = first + i * kThreads;
          v[r][i] = row + r < n && at < quads ? in[at] : float4{0.f, 0.f, 0.f, 0.f};
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const float4 u = v[r][i];
          sum[r] = fmaf(u.w, u.w, fmaf(u.z, u.z, fmaf(u.y, u.y, fmaf(u.x, u.x, sum[r]))));
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float total = warp_sum(sum[r]);
      if (row + r < n && thread % kWarp == 0) sums[(row + r) * NormBlock::kWarps + thread / kWarp] = total;
    }
  }
}

// each(row, i, t): t is elements 4i .. 4i+3 of the normed row.                                      weight: [hidden]
template <int kUnroll, class Each>
__device__ __forceinline__ void each_normed(const float* sums, const float* x, int n, int hidden, const float* weight,
                                            float eps, const Each& each) {
  const float4* w = reinterpret_cast<const float4*>(weight);
  for (int row = 0; row < n; ++row) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < NormBlock::kWarps; ++i) total += sums[row * NormBlock::kWarps + i];
    const float scale = 1.f / sqrtf(total / static_cast<float>(hidden) + eps);
    const float4* in = reinterpret_cast<const float4*>(x + static_cast<int64_t>(row) * hidden);
#pragma unroll kUnroll
    for (int i = static_cast<int>(threadIdx.x); i < hidden / 4; i += NormBlock::kThreads) {
      const float4 u = in[i], v = w[i];
      each(row, i, float4{u.x * scale * v.x, u.y * scale * v.y, u.z * scale * v.z, u.w * scale * v.w});
    }
  }
}

__device__ __forceinline__ uint2 pack_bf16(float4 v) { return {pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)}; }

}  // namespace gptoss::cuda
