// The products of matmul.h with bytes for operands: weights of int8 or FP4 panels times tokens rounded to int8.
//
// A block of inputs (32, or 64 of int8 weights) is summed in int32, which is exact; the sum, times both scales, is added to
// running float32 sums, block after block. FP4 codes become bytes in registers, anew for each tile of tokens.
#pragma once
#include "matmul.h"
#include "pack_int8.h"

namespace {

// Adds one quad of inputs of 16 or 32 rows times T tokens.
template <int64_t H, int T, class W>
INLINE void add_quad(I32 (&sums)[H][T], const W (&w)[H], const int8_t* x) {
  UNROLL for (int t = 0; t < T; ++t) {
    const Quad token = load_quad(x + 4 * t);
    UNROLL for (int h = 0; h < H; ++h) sums[h][t] = dot4(sums[h][t], w[h], token);
  }
}

struct Int8Panel {
  using W = Int8Weights;
  static constexpr bool kMxfp4 = false;
  static constexpr int64_t kInputs = kInt8Block;  // of a block
  const uint8_t* blocks;                          // [K/64] of kInt8BlockBytes

  INLINE int64_t bytes(int64_t cols) { return gptoss::cpu::int8_panel_bytes(cols); }
  INLINE bool fetches_stream(int64_t n) { return n > 1 || kHalves == 1; }  // AVX2 keeps the prefetcher too little ahead
  INLINE Int8Panel at(const uint8_t* panel, int64_t) { return {panel}; }
  template <int64_t H, int T>
  INLINE void add_block(I32 (&sums)[H][T], const Int8Panel& p, int64_t block, int64_t half, const int8_t* x) {
    const uint8_t* bytes = p.blocks + block * kInt8BlockBytes + 64 + half * 64;
    UNROLL for (int64_t quad = 0; quad < kInputs / 4; ++quad, bytes += 128, x += 4 * T) {
      W w[H];
      UNROLL for (int h = 0; h < H; ++h) w[h] = load_int8(bytes + 64 * h);
      add_quad(sums, w, x);
    }
  }
  INLINE F32 scales(const Int8Panel& p, int64_t block, int64_t half) {
    return load_bf16((const uint16_t*)(p.blocks + block * kInt8BlockBytes) + half * 16);
  }
  INLINE F32 times(F32 scales, int32_t token_scale) { return mul(scales, set1(as_float((uint32_t)token_scale))); }
};

struct CodePanel {
  using W = CodeWeights;
  static constexpr bool kMxfp4 = true;
  static constexpr int64_t kInputs = 32;
  const uint8_t* scale_bytes;  // [K/32][32]
  const uint8_t* codes;        // [K/8][32][4]

  INLINE int64_t bytes(int64_t cols) { return gptoss::cpu::mxfp4_panel_bytes(cols); }
  INLINE bool fetches_stream(int64_t) { return true; }
  INLINE CodePanel at(const uint8_t* panel, int64_t cols) { return {panel, panel + gptoss::cpu::mxfp4_scale_bytes(cols)}; }
  template <int64_t H, int T>
  INLINE void add_block(I32 (&sums)[H][T], const CodePanel& p, int64_t block, int64_t half, const int8_t* x) {
    const uint8_t* c = p.codes + block * 512 + half * 64;
    UNROLL for (int64_t group = 0; group < 4; ++group, c += 128, x += 8 * T) {
      W low[H], high[H];
      UNROLL for (int h = 0; h < H; ++h) decode_codes(low[h], high[h], c + 64 * h);
      add_quad(sums, low, x);
      add_quad(sums, high, x + 4 * T);
    }
  }
  INLINE F32 scales(const CodePanel& p, int64_t block, int64_t half) {
    return load_exponents(p.scale_bytes + block * 32 + half * 16);
  }
  // An addition, for the units that multiply are busy with the products.
  INLINE F32 times(F32 exponents, int32_t token_scale) { return add_bits(exponents, token_scale); }
};

// totals: [2 halves][T][16] = panel x tile. A block's sums and the running ones stay in registers, as many as there are of
// both.
template <class Panel, int T>
static void int8_panel_times_tile(float* totals, const Panel& panel, const uint8_t* tile, int64_t cols, Ahead ahead) {
  using W = typename Panel::W;
  constexpr int64_t kTokenBytes = gptoss::cpu::int8_token_block_bytes(Panel::kInputs);
  constexpr int64_t H = int8_halves(T);
  for (int64_t half = 0; half < 2; half += H) {
    const float* starts = (const float*)tile;  // [T]
    F32 running[H][T];
    UNROLL for (int t = 0; t < T; ++t) { UNROLL for (int h = 0; h < H; ++h) running[h][t] = set1(starts[t]); }
    const uint8_t* tokens = tile + 4 * T;
    for (int64_t block = 0; block * Panel::kInputs < cols; ++block, tokens += T * kTokenBytes) {
      fetch(ahead);
      const int32_t* scales = (const int32_t*)tokens;  // [T]
      const int32_t* corrections = scales + T;         // [T]
      I32 sums[H][T];
      UNROLL for (int t = 0; t < T; ++t) { UNROLL for (int h = 0; h < H; ++h) sums[h][t] = start<W>(corrections[t]); }
      Panel::add_block(sums, panel, block, half, (const int8_t*)(corrections + T));
      UNROLL for (int h = 0; h < H; ++h) {
        const F32 weight_scales = Panel::scales(panel, block, half + h);
        UNROLL for (int t = 0; t < T; ++t) running[h][t] =
            fma(to_float<W>(sums[h][t]), Panel::times(weight_scales, scales[t]), running[h][t]);
      }
    }
    UNROLL for (int h = 0; h < H; ++h) {
      UNROLL for (int t = 0; t < T; ++t) store(totals + ((half + h) * T + t) * kLanes, running[h][t]);
    }
  }
}

// totals: 16 gates and 16 ups of n tokens -> inputs 16 panel .. of the following product, float32.
static void write_hidden(const MatmulArgs& a, const float* totals, int64_t panel, int64_t first, int64_t n) {
  float bias[32];
  load_gate_up_bias(bias, a.bias, panel, a.rows);
  for (int64_t t = 0; t < n; ++t) {
    const F32 gate = add(load(totals + t * kLanes), load(bias)), up = add(load(totals + (n + t) * kLanes), load(bias + 16));
    store(a.out + (first + t) * a.out_stride + panel * 16, swiglu(gate, up, a.swiglu_limit));
  }
}

template <class P>
struct Int8Product {
  using Panel = P;
  static constexpr TileSizes kTiles = kInt8Tiles;

  template <int T>
  static void multiply(const MatmulArgs& a, const uint8_t* data, int64_t panel, int64_t first, Ahead ahead) {
    alignas(64) float totals[2 * T * kLanes];
    const uint8_t* tile = (const uint8_t*)a.packed + first * gptoss::cpu::int8_token_bytes(a.cols, Panel::kMxfp4);
    if (a.epilogue == Epilogue::kAdd) fetch_rows(a, panel, first, T);
    int8_panel_times_tile<Panel, T>(totals, Panel::at(data, a.cols), tile, a.cols, ahead);
    if (a.epilogue == Epilogue::kSwiglu)
      write_hidden(a, totals, panel, first, T);
    else
      write_rows(a, totals, panel, first, T);
  }
};

static void matmul_int8(const MatmulArgs& a) {
  if (a.mxfp4)
    multiply_panels<Int8Product<CodePanel>>(a);
  else
    multiply_panels<Int8Product<Int8Panel>>(a);
}

}  // namespace
