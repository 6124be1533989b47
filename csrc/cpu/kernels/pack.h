// Into the layouts of kernel_table.h: weight panels while loading, token tiles before a product.
#pragma once
#include "cpu/kernel_table.h"
#include "simd.h"

namespace {

using gptoss::cpu::kPanelRows;

// Where row r of a panel's source goes: unchanged, or gates first and then ups.
INLINE int64_t panel_lane(int64_t r, bool gate_up) { return gate_up ? r % 2 * 16 + r / 2 : r; }

static void pack_bf16_panel(uint8_t* panel, const uint16_t* source, int64_t n_rows, int64_t cols, bool gate_up) {
  uint32_t* out = (uint32_t*)panel;  // [cols/2][32]
  if (n_rows < kPanelRows) __builtin_memset(panel, 0, gptoss::cpu::bf16_panel_bytes(cols));
  // 16 pairs at a time: a 64-byte line of every row, so that both sides stay in the first-level cache.
  for (int64_t pair0 = 0; pair0 < cols / 2; pair0 += 16) {
    for (int64_t r = 0; r < n_rows; ++r) {
      const uint32_t* in = (const uint32_t*)(source + r * cols) + pair0;
      uint32_t* column = out + pair0 * kPanelRows + panel_lane(r, gate_up);
      for (int64_t i = 0; i < 16; ++i) column[i * kPanelRows] = in[i];
    }
  }
}

// Bytes hold codes 0 1 | 2 3 | 4 5 | 6 7, low nibble first -> the low half holds 0 2 4 6, the high half 1 3 5 7.
INLINE uint32_t split_codes(uint32_t v) {
  uint32_t even = v & 0x0F0F0F0F, odd = (v >> 4) & 0x0F0F0F0F;
  even = (even | even >> 4) & 0x00FF00FF;
  odd = (odd | odd >> 4) & 0x00FF00FF;
  even = (even | even >> 8) & 0xFFFF;
  odd = (odd | odd >> 8) & 0xFFFF;
  return even | odd << 16;
}

static void pack_mxfp4_blocks(uint8_t* panel, const uint8_t* blocks, int64_t n_rows, int64_t cols, bool gate_up) {
  uint32_t* out = (uint32_t*)(panel + gptoss::cpu::mxfp4_scale_bytes(cols));  // [cols/8][32]
  uint32_t in[kPanelRows][4] = {};                                            // one block of 32 inputs of every lane
  for (int64_t block = 0; block < cols / 32; ++block, out += 4 * kPanelRows) {
    for (int64_t r = 0; r < n_rows; ++r) __builtin_memcpy(in[panel_lane(r, gate_up)], blocks + r * cols / 2 + block * 16, 16);
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t lane = 0; lane < kPanelRows; ++lane) out[i * kPanelRows + lane] = split_codes(in[lane][i]);
  }
}

static void pack_mxfp4_scales(uint8_t* panel, const uint8_t* scales, int64_t n_rows, int64_t cols, bool gate_up) {
  const int64_t n_blocks = cols / 32;
  if (n_rows < kPanelRows) __builtin_memset(panel, 0, n_blocks * kPanelRows);
  for (int64_t r = 0; r < n_rows; ++r)
    for (int64_t b = 0; b < n_blocks; ++b) panel[b * kPanelRows + panel_lane(r, gate_up)] = scales[r * n_blocks + b];
}

// Writes inputs i .. i + 15 of token t into a tile of n tokens, [K/2][n][2].
INLINE void put_in_tile(Packed* tile, int64_t i, int64_t t, int64_t n, F32 x) {
  Packed* out = tile + i * n + 2 * t;
  if (n == 1) return store_packed(out, x);
  Packed values[16];
  store_packed(values, x);
  for (int64_t pair = 0; pair < 8; ++pair) __builtin_memcpy(out + 2 * pair * n, values + 2 * pair, 2 * sizeof(Packed));
}

static void pack_tokens(void* tile, const float* x, int64_t stride, const int32_t* rows, int64_t n, int64_t cols) {
  for (int64_t t = 0; t < n; ++t) {
    const float* in = x + (rows ? rows[t] : t) * stride;
    for (int64_t i = 0; i < cols; i += kLanes) put_in_tile((Packed*)tile, i, t, n, load(in + i));
  }
}

}  // namespace
