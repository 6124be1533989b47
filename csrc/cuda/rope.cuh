// Rotation (YaRN, half-split: pair i of a head is elements i and i + 32) and the write into the cache, a pair at a time. Keys
// lie as [128, 64] in their head's part of a page, values as [64, 128], so that attention reads 16 bytes of either as one
// fragment.
#pragma once
#include "cuda/kernels.h"

namespace gptoss::cuda {

// Where a row's pair goes, and the angle it is turned by.
struct RopePlace {
  int page, slot;
  float cos, sin;
};

__device__ __forceinline__ RopePlace find_place(const RopeArgs& a, int64_t row, int pair) {
  const int position = a.batch.positions[row];
  const int32_t* base = a.window ? a.batch.window_base : a.batch.full_base;
  const int page = a.batch.pages[base[a.batch.sequence_of[row]] + position / 128];
  return {page, position % 128, a.cos[position * 32 + pair], a.sin[position * 32 + pair]};
}

// Heads are the queries', then the keys', then the values' (which are not turned).
__device__ __forceinline__ void append_pair(const RopeArgs& a, const RopePlace& at, int64_t row, int head, int pair,
                                            float first, float second) {
  const float turned_first = first * at.cos - second * at.sin, turned_second = second * at.cos + first * at.sin;
  if (head < a.heads) {
    float* out = a.q + (row * a.heads + head) * 64 + pair;
    out[0] = turned_first;
    out[32] = turned_second;
    return;
  }
  const bool is_key = head < a.heads + a.kv_heads;
  const int64_t kv_head = head - a.heads - (is_key ? 0 : a.kv_heads),
                offset = (int64_t{at.page} * a.kv_heads + kv_head) * 128 * 64;
  const uint32_t packed = is_key ? pack_bf16(turned_first, turned_second) : pack_bf16(first, second);
  uint16_t* to = is_key ? a.keys + offset + at.slot * 64 + pair : a.values + offset + pair * 128 + at.slot;
  to[0] = static_cast<uint16_t>(packed);
  to[is_key ? 32 : 32 * 128] = static_cast<uint16_t>(packed >> 16);
}

}  // namespace gptoss::cuda
