// Operations that touch each number once: embedding, RMSNorm, rounding, rotation with the cache write. All are bound by the
// bytes they move. A row is one block's work, so its result depends on no other row.
#include "cuda/kernels.h"
#include "cuda/norm.cuh"
#include "cuda/rope.cuh"

namespace gptoss::cuda {
namespace {

constexpr int kThreads = NormBlock::kThreads;

__global__ void embed_kernel(float* x, const int32_t* tokens, const uint16_t* table, int64_t hidden) {
  let_next_start();
  wait_for_previous();
  const uint16_t* row = table + tokens[blockIdx.x] * hidden;
  for (int64_t i = threadIdx.x; i < hidden; i += kThreads) x[blockIdx.x * hidden + i] = bf16_low(row[i]);
}

template <bool kListed>
__global__ void __launch_bounds__(kThreads)
    rmsnorm_kernel(float* t, Rounded rounded, const float* x, const float* weight, float eps, int hidden, RowList list) {
  let_next_start();
  wait_for_previous();
  float* sums = shared_memory<float>();  // [warps]
  const int64_t row = blockIdx.x;
  const float* in = x + (kListed ? list.rows[row] : row) * hidden;
  square_sums<1>(sums, in, 1, hidden);
  __syncthreads();
  float4* out = reinterpret_cast<float4*>(t + row * hidden);
  uint2* packed = reinterpret_cast<uint2*>(rounded.data + row * rounded.stride);
  each_normed<3>(sums, in, 1, hidden, weight, eps, [&](int, int i, float4 value) {
    out[i] = value;
    packed[i] = pack_bf16(value);
  });
  for (int64_t i = hidden / 4 + threadIdx.x; i < rounded.stride / 4; i += kThreads) packed[i] = {0, 0};
}

__global__ void round_kernel(Rounded rounded, const float* x, int64_t cols) {
  let_next_start();
  wait_for_previous();
  const float2* in = reinterpret_cast<const float2*>(x + blockIdx.x * cols);
  uint32_t* out = reinterpret_cast<uint32_t*>(rounded.data + blockIdx.x * rounded.stride);
  for (int64_t i = threadIdx.x; i < rounded.stride / 2; i += kThreads) {
    const float2 value = i < cols / 2 ? in[i] : float2{0.f, 0.f};
    out[i] = pack_bf16(value.x, value.y);
  }
}

__global__ void rope_append_kernel(RopeArgs a, const float* qkv) {
  let_next_start();
  wait_for_previous();
  const int64_t row = blockIdx.x;
  const int heads = a.heads + 2 * a.kv_heads;
  const float* in = qkv + row * heads * 64;
  for (int unit = static_cast<int>(threadIdx.x); unit < heads * 32; unit += kThreads) {
    const int head = unit / 32, pair = unit % 32;
    append_pair(a, find_place(a, row, pair), row, head, pair, in[head * 64 + pair], in[head * 64 + pair + 32]);
  }
}

Launch rows_launch(int64_t n, cudaStream_t stream) { return {dim3(static_cast<unsigned>(n)), dim3(kThreads), 0, stream}; }

}  // namespace

void embed(float* x, const int32_t* tokens, const uint16_t* table, int64_t n, int64_t hidden, cudaStream_t stream) {
  launch(rows_launch(n, stream), embed_kernel, x, tokens, table, hidden);
}

void rmsnorm(float* t, Rounded rounded, const float* x, const float* weight, float eps, int64_t n, int64_t hidden,
             const RowList* rows, cudaStream_t stream) {
  Launch l = rows_launch(n, stream);
  l.shared_bytes = NormBlock::kWarps * sizeof(float);
  if (rows)
    launch(l, rmsnorm_kernel<true>, t, rounded, x, weight, eps, static_cast<int>(hidden), *rows);
  else
    launch(l, rmsnorm_kernel<false>, t, rounded, x, weight, eps, static_cast<int>(hidden), RowList{});
}

void round_rows(Rounded rounded, const float* x, int64_t n, int64_t cols, cudaStream_t stream) {
  launch(rows_launch(n, stream), round_kernel, rounded, x, cols);
}

void rope_append(const RopeArgs& args, const float* qkv, int64_t n, cudaStream_t stream) {
  launch(rows_launch(n, stream), rope_append_kernel, args, qkv);
}

}  // namespace gptoss::cuda
