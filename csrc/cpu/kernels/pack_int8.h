// Rounding to int8, 32 inputs to a scale: rows of weights while loading, token tiles before a product.
//
// A scale is the block's largest magnitude / 127, a code the nearest integer to x / scale. A block below 2^-50 counts as zero.
// What is not finite, or a token's number from 2^60 on, makes every output that it has a part in not a number.
#pragma once
#include "cpu/kernel_table.h"
#include "pack.h"
#include "simd_int8.h"

namespace {

using gptoss::cpu::kInt8BlockBytes;
using gptoss::cpu::kInt8TokenBlockBytes;

constexpr uint32_t kSmallestBits = 0x26800000, kLargestBits = 0x5D800000, kInfinityBits = 0x7F800000;  // 2^-50, 2^60

INLINE float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// x / 127 as bfloat16, rounded away from zero: the codes must not go beyond 127.
INLINE uint16_t weight_scale(float largest) {
  const float scale = largest / 127.f;
  uint32_t bits;
  __builtin_memcpy(&bits, &scale, 4);
  return (uint16_t)((bits + 0xFFFF) >> 16);
}

// One row's block of 32 weights; codes: [8 quads] of 4, `stride` bytes apart, plus kInt8Offset.
INLINE uint16_t pack_int8_block(uint8_t* codes, int64_t stride, const uint16_t* source) {
  const F32 a = load_bf16(source), b = load_bf16(source + 16);
  const uint32_t bits = largest_bits(a, b);
  const bool finite = bits < kInfinityBits, zeros = bits < kSmallestBits || !finite;
  const uint16_t scale = zeros ? 0 : weight_scale(as_float(bits));
  int8_t rounded[32] = {};
  if (!zeros) {
    const F32 inverse = set1(1.f / as_float((uint32_t)scale << 16));
    to_int8(rounded, mul(a, inverse));
    to_int8(rounded + 16, mul(b, inverse));
  }
  for (int64_t quad = 0; quad < 8; ++quad)
    for (int64_t i = 0; i < 4; ++i) codes[quad * stride + i] = (uint8_t)(rounded[quad * 4 + i] + kInt8Offset);
  return finite ? scale : 0x7FC0;
}

static void pack_int8_panel(uint8_t* panel, const uint16_t* source, int64_t n_rows, int64_t cols) {
  if (n_rows < kPanelRows) __builtin_memset(panel, 0, gptoss::cpu::int8_panel_bytes(cols));  // scales of 0
  for (int64_t block = 0; block < cols / 32; ++block, panel += kInt8BlockBytes)
    for (int64_t r = 0; r < n_rows; ++r) {
      const uint16_t scale = pack_int8_block(panel + 64 + 4 * r, 4 * kPanelRows, source + r * cols + block * 32);
      __builtin_memcpy(panel + 2 * r, &scale, 2);
    }
}

// offset: what the weights' bytes have added to them.
static void pack_tokens_int8(void* tile, const float* x, int64_t stride, const int32_t* rows, int64_t n, int64_t cols,
                             bool mxfp4) {
  const int32_t offset = mxfp4 ? 12 : kInt8Offset;
  for (int64_t t = 0; t < n; ++t) {
    const float* in = x + (rows ? rows[t] : t) * stride;
    float start = 0.f;
    uint8_t* block = (uint8_t*)tile + 4 * n;
    for (int64_t i = 0; i < cols; i += 32, block += n * kInt8TokenBlockBytes) {
      const F32 a = load(in + i), b = load(in + i + 16);
      const uint32_t bits = largest_bits(a, b);
      int8_t codes[32] = {};
      int32_t correction = 0, scale_bits = 0;
      if (bits >= kLargestBits) start = __builtin_nanf("");
      if (bits >= kSmallestBits && bits < kLargestBits) {
        const float largest = as_float(bits), scale = largest / 127.f;
        const F32 inverse = set1(127.f / largest);
        const int32_t sum = to_int8(codes, mul(a, inverse)) + to_int8(codes + 16, mul(b, inverse));
        __builtin_memcpy(&scale_bits, &scale, 4);
        if (mxfp4) scale_bits -= 128 << 23;
        correction = correction_of(codes, sum, offset);
      }
      __builtin_memcpy(block + 4 * t, &scale_bits, 4);
      __builtin_memcpy(block + 4 * (n + t), &correction, 4);
      for (int64_t quad = 0; quad < 8; ++quad) __builtin_memcpy(block + 8 * n + 4 * (quad * n + t), codes + 4 * quad, 4);
    }
    __builtin_memcpy((uint8_t*)tile + 4 * t, &start, 4);
  }
}

}  // namespace
