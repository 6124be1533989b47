// Operations that touch each number once: embedding, RMSNorm, rounding, rotation with the cache write. All are bound by the
// bytes they move. A row is one block's work, so its result depends on no other row.
#include "cuda/kernels.h"

namespace gptoss::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void embed_kernel(float* x, const int32_t* tokens, const uint16_t* table, int64_t hidden) {
  wait_for_previous();
  const uint16_t* row = table + tokens[blockIdx.x] * hidden;
  for (int64_t i = threadIdx.x; i < hidden; i += kThreads) x[blockIdx.x * hidden + i] = bf16_low(row[i]);
}

// t = x / sqrt(mean(x^2) + eps) * weight. Squares are summed by thread, by warp, then over the warps in order.
template <bool kListed>
__global__ void __launch_bounds__(kThreads)
    rmsnorm_kernel(float* t, Rounded rounded, const float* x, const float* weight, float eps, int64_t hidden, RowList list) {
  wait_for_previous();
  float* sums = shared_memory<float>();  // [warps]
  const int64_t row = kListed ? list.rows[blockIdx.x] : blockIdx.x;
  const float2* in = reinterpret_cast<const float2*>(x + row * hidden);
  float sum = 0;
  for (int64_t i = threadIdx.x; i < hidden / 2; i += kThreads) sum = fmaf(in[i].y, in[i].y, fmaf(in[i].x, in[i].x, sum));
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) total += sums[w];
  const float scale = 1.f / sqrtf(total / static_cast<float>(hidden) + eps);
  float2* out = reinterpret_cast<float2*>(t + blockIdx.x * hidden);
  uint32_t* packed = reinterpret_cast<uint32_t*>(rounded.data + blockIdx.x * rounded.stride);
  const float2* w = reinterpret_cast<const float2*>(weight);
  for (int64_t i = threadIdx.x; i < rounded.stride / 2; i += kThreads) {
    float2 value = {0.f, 0.f};
    if (i < hidden / 2) {
      value.x = in[i].x * scale * w[i].x;
      value.y = in[i].y * scale * w[i].y;
      out[i] = value;
    }
    packed[i] = pack_bf16(value.x, value.y);
  }
}

__global__ void round_kernel(Rounded rounded, const float* x, int64_t cols) {
  wait_for_previous();
  const float2* in = reinterpret_cast<const float2*>(x + blockIdx.x * cols);
  uint32_t* out = reinterpret_cast<uint32_t*>(rounded.data + blockIdx.x * rounded.stride);
  for (int64_t i = threadIdx.x; i < rounded.stride / 2; i += kThreads) {
    const float2 value = i < cols / 2 ? in[i] : float2{0.f, 0.f};
    out[i] = pack_bf16(value.x, value.y);
  }
}

// Pair i of a head is elements i and i + 32. Keys lie as [128, 64] in their head's part of a page, values as [64, 128], so that
// attention reads 16 bytes of either as one fragment.
__global__ void rope_append_kernel(float* q, uint16_t* keys, uint16_t* values, const float* qkv, const float* cos,
                                   const float* sin, DeviceBatch batch, bool window, int heads, int kv_heads) {
  wait_for_previous();
  const int64_t row = blockIdx.x, position = batch.positions[row];
  const int32_t* base = window ? batch.window_base : batch.full_base;
  const int64_t page = batch.pages[base[batch.sequence_of[row]] + position / 128], slot = position % 128;
  const float* in = qkv + row * (heads + 2 * kv_heads) * 64;
  for (int unit = static_cast<int>(threadIdx.x); unit < (heads + 2 * kv_heads) * 32; unit += kThreads) {
    const int head = unit / 32, pair = unit % 32;
    const float a = in[head * 64 + pair], b = in[head * 64 + pair + 32];
    const float c = cos[position * 32 + pair], s = sin[position * 32 + pair];
    const float first = a * c - b * s, second = b * c + a * s;
    if (head < heads) {
      float* out = q + row * heads * 64 + head * 64 + pair;
      out[0] = first;
      out[32] = second;
      continue;
    }
    const bool is_key = head < heads + kv_heads;
    const int64_t kv_head = head - heads - (is_key ? 0 : kv_heads), offset = (page * kv_heads + kv_head) * 128 * 64;
    const uint32_t packed = is_key ? pack_bf16(first, second) : pack_bf16(a, b);
    uint16_t* to = is_key ? keys + offset + slot * 64 + pair : values + offset + pair * 128 + slot;
    to[0] = static_cast<uint16_t>(packed);
    to[is_key ? 32 : 32 * 128] = static_cast<uint16_t>(packed >> 16);
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
  l.shared_bytes = kThreads / kWarp * sizeof(float);
  if (rows)
    launch(l, rmsnorm_kernel<true>, t, rounded, x, weight, eps, hidden, *rows);
  else
    launch(l, rmsnorm_kernel<false>, t, rounded, x, weight, eps, hidden, RowList{});
}

void round_rows(Rounded rounded, const float* x, int64_t n, int64_t cols, cudaStream_t stream) {
  launch(rows_launch(n, stream), round_kernel, rounded, x, cols);
}

void rope_append(float* q, uint16_t* keys, uint16_t* values, const float* qkv, const float* cos, const float* sin,
                 const DeviceBatch& batch, bool window, int64_t n, int64_t heads, int64_t kv_heads, cudaStream_t stream) {
  launch(rows_launch(n, stream), rope_append_kernel, q, keys, values, qkv, cos, sin, batch, window, static_cast<int>(heads),
         static_cast<int>(kv_heads));
}

}  // namespace gptoss::cuda
