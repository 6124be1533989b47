// Rounding to int8, a block of inputs to a scale: rows of weights while loading, token tiles before a product.
//
// A scale is the block's largest magnitude / 127, a code the nearest integer to x / scale. A block below 2^-50 counts as zero.
// What is not finite, or a token's number from 2^60 on, makes every output that it has a part in not a number.
#pragma once
#include "cpu/kernel_table.h"
#include "pack.h"
#include "simd_int8.h"

namespace {

using gptoss::cpu::kInt8Block;
using gptoss::cpu::kInt8BlockBytes;

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

constexpr int kInt8Vectors = kInt8Block / kLanes;

INLINE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// One row's block of weights, n inputs of it; codes: [16 quads] of 4, `stride` bytes apart, plus kInt8Offset.
INLINE uint16_t pack_int8_block(uint8_t* codes, int64_t stride, const uint16_t* source, int64_t n) {
  F32 x[kInt8Vectors];
  for (int i = 0; i < kInt8Vectors; ++i) x[i] = i * kLanes < n ? load_bf16(source + i * kLanes) : zero();
  const uint32_t bits = larger(largest_bits(x[0], x[1]), largest_bits(x[2], x[3]));
  const bool finite = bits < kInfinityBits, zeros = bits < kSmallestBits || !finite;
  const uint16_t scale = zeros ? 0 : weight_scale(as_float(bits));
  int8_t rounded[kInt8Block] = {};
  if (!zeros) {
    const F32 inverse = set1(1.f / as_float((uint32_t)scale << 16));
    for (int i = 0; i < kInt8Vectors; i += 2) to_int8(rounded + i * kLanes, mul(x[i], inverse), mul(x[i + 1], inverse));
  }
  for (int64_t quad = 0; quad < kInt8Block / 4; ++quad)
    for (int64_t i = 0; i < 4; ++i) codes[quad * stride + i] = (uint8_t)(rounded[quad * 4 + i] + kInt8Offset);
  return finite ? scale : 0x7FC0;
}

static void pack_int8_panel(uint8_t* panel, const uint16_t* source, int64_t n_rows, int64_t cols) {
  if (n_rows < kPanelRows) __builtin_memset(panel, 0, gptoss::cpu::int8_panel_bytes(cols));  // scales of 0
  for (int64_t i = 0; i < cols; i += kInt8Block, panel += kInt8BlockBytes)
    for (int64_t r = 0; r < n_rows; ++r) {
      const uint16_t scale = pack_int8_block(panel + 64 + 4 * r, 4 * kPanelRows, source + r * cols + i, cols - i);
      __builtin_memcpy(panel + 2 * r, &scale, 2);
    }
}

// Blocks of kInputs; offset: what the weights' bytes have added to them; scale_offset: added to the bits of a scale.
template <int64_t kInputs>
static void pack_int8_tile(uint8_t* tile, const float* x, int64_t stride, const int32_t* rows, int64_t n, int64_t cols,
                           int32_t offset, int32_t scale_offset) {
  constexpr int kVectors = kInputs / kLanes;
  for (int64_t t = 0; t < n; ++t) {
    const float* in = x + (rows ? rows[t] : t) * stride;
    float start = 0.f;
    uint8_t* block = tile + 4 * n;
    for (int64_t i = 0; i < cols; i += kInputs, block += n * gptoss::cpu::int8_token_block_bytes(kInputs)) {
      F32 v[kVectors];
      uint32_t bits = 0;
      UNROLL for (int j = 0; j < kVectors; ++j) v[j] = i + j * kLanes < cols ? load(in + i + j * kLanes) : zero();
      UNROLL for (int j = 0; j < kVectors; j += 2) bits = larger(bits, largest_bits(v[j], v[j + 1]));
      int8_t codes[kInputs] = {};
      int32_t sum = 0, scale_bits = 0;
      if (bits >= kLargestBits) start = __builtin_nanf("");
      if (bits >= kSmallestBits && bits < kLargestBits) {
        const float largest = as_float(bits), scale = largest / 127.f;
        const F32 inverse = set1(127.f / largest);
        UNROLL for (int j = 0; j < kVectors; j += 2) sum +=
            to_int8(codes + j * kLanes, mul(v[j], inverse), mul(v[j + 1], inverse));
        __builtin_memcpy(&scale_bits, &scale, 4);
        scale_bits += scale_offset;
      }
      __asm__("" : "+m"(codes));  // or GCC takes quads out of registers, with two instructions each
      const int32_t correction = correction_of(codes, sum, offset);
      __builtin_memcpy(block + 4 * t, &scale_bits, 4);
      __builtin_memcpy(block + 4 * (n + t), &correction, 4);
      for (int64_t quad = 0; quad < kInputs / 4; ++quad)
        __builtin_memcpy(block + 8 * n + 4 * (quad * n + t), codes + 4 * quad, 4);
    }
    __builtin_memcpy(tile + 4 * t, &start, 4);
  }
}

static void pack_tokens_int8(void* tile, const float* x, int64_t stride, const int32_t* rows, int64_t n, int64_t cols,
                             bool mxfp4) {
  if (mxfp4)
    pack_int8_tile<32>((uint8_t*)tile, x, stride, rows, n, cols, 12, -(128 << 23));
  else
    pack_int8_tile<kInt8Block>((uint8_t*)tile, x, stride, rows, n, cols, kInt8Offset, 0);
}

}  // namespace
