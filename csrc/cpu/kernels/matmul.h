// Panels of weights times tiles of tokens:  out[t][r] = sum_k x[t][k] W[r][k].
//
// One call walks the panels given, and each panel meets every tile while it is in cache. In the inner loop a lane is an output
// row: 16 lanes x halves x T tokens of sums stay in registers for one block of 32 inputs; the block's sums, times the
// MXFP4 scales, are then added to running sums in the first-level cache. FP4 codes become bfloat16
// (float32 without AVX-512) in registers.
#pragma once
#include "cpu/kernel_table.h"
#include "pack.h"
#include "simd.h"

namespace {

using gptoss::cpu::Epilogue;
using gptoss::cpu::MatmulArgs;
using gptoss::cpu::TileSizes;

struct Bf16Panel {
  static constexpr bool kScaled = false;
  static constexpr int64_t kInputs = 32;  // of a block
  // One tile: a stream long enough for the processor's own prefetcher, unless every other line is left out.
  static constexpr bool kFetchesStream = false;
  const uint16_t* pairs;  // [K/2][32][2]

  INLINE int64_t bytes(int64_t cols) { return gptoss::cpu::bf16_panel_bytes(cols); }
  INLINE bool fetches_stream(int64_t n) { return n == 2 || n == 3 || halves(n) == 1; }
  INLINE Bf16Panel at(const uint8_t* panel, int64_t) { return {(const uint16_t*)panel}; }

  template <int64_t H, int T>
  INLINE void add_block(F32 (&sums)[H][T], const Bf16Panel& p, int64_t block, int64_t half, const Packed* x) {
    const uint16_t* w = p.pairs + block * 1024 + half * 32;
    for (int64_t pair = 0; pair < 16; ++pair, w += 64, x += 2 * T) {
      decltype(panel_weights(w)) weights[H];
      UNROLL for (int h = 0; h < H; ++h) weights[h] = panel_weights(w + 32 * h);
      add_pair(sums, weights, x);
    }
  }
  INLINE F32 accumulate(F32 total, F32 sum, const Bf16Panel&, int64_t, int64_t) { return add(total, sum); }
};

struct Mxfp4Panel {
  static constexpr bool kScaled = true;
  static constexpr int64_t kInputs = 32;
  const uint8_t* scales;  // [K/32][32]
  const uint8_t* codes;   // [K/8][32][4]

  INLINE int64_t bytes(int64_t cols) { return gptoss::cpu::mxfp4_panel_bytes(cols); }
  INLINE bool fetches_stream(int64_t) { return true; }
  INLINE Mxfp4Panel at(const uint8_t* panel, int64_t cols) { return {panel, panel + gptoss::cpu::mxfp4_scale_bytes(cols)}; }

  template <int j, int64_t H, int T>
  INLINE void add_code_pair(F32 (&sums)[H][T], const Codes (&codes)[H], const Packed* x) {
    decltype(code_pair<j>(codes[0])) weights[H];
    UNROLL for (int h = 0; h < H; ++h) weights[h] = code_pair<j>(codes[h]);
    add_pair(sums, weights, x + 2 * T * j);
  }

  template <int64_t H, int T>
  INLINE void add_block(F32 (&sums)[H][T], const Mxfp4Panel& p, int64_t block, int64_t half, const Packed* x) {
    const uint8_t* c = p.codes + block * 512 + half * 64;
    for (int64_t group = 0; group < 4; ++group, c += 128, x += 8 * T) {
      Codes codes[H];
      UNROLL for (int h = 0; h < H; ++h) codes[h] = load_codes(c + 64 * h);
      add_code_pair<0>(sums, codes, x);
      add_code_pair<1>(sums, codes, x);
      add_code_pair<2>(sums, codes, x);
      add_code_pair<3>(sums, codes, x);
    }
  }
  INLINE F32 accumulate(F32 total, F32 sum, const Mxfp4Panel& p, int64_t block, int64_t half) {
    if constexpr (kCodeUnit != 1) sum = mul(sum, set1(kCodeUnit));
    return fma(sum, load_scales(p.scales + block * 32 + half * 16), total);
  }
};

// What a tile fetches into the cache while it works: `step` bytes (a multiple of 64) with every block.
struct Ahead {
  const uint8_t* data = nullptr;
  int64_t step = 0;
};

INLINE void fetch(Ahead& ahead) {
  for (int64_t i = 0; i < ahead.step; i += 64) __builtin_prefetch(ahead.data + i, 0, 2);
  ahead.data += ahead.step;
}

// totals: [2 halves][T][16] = panel x tile
template <class Panel, int T>
static void panel_times_tile(float* totals, const Panel& panel, const Packed* x, int64_t cols, Ahead ahead) {
  constexpr int64_t H = halves(T);
  for (int64_t half = 0; half < 2; half += H) {
    float* out = totals + half * T * kLanes;
    for (int64_t i = 0; i < H * T; ++i) store(out + i * kLanes, zero());
    for (int64_t block = 0; block < cols / 32; ++block) {
      fetch(ahead);
      // Or GCC carries running sums over to the next block in registers, and sums of this block have none (FP4 panels with 32
      // registers are quicker with it).
      if constexpr (!Panel::kScaled || kHalves == 1) __asm__ volatile("" : "+r"(out));
      F32 sums[H][T];
      UNROLL for (int h = 0; h < H; ++h) { UNROLL for (int t = 0; t < T; ++t) sums[h][t] = zero(); }
      Panel::add_block(sums, panel, block, half, x + block * 32 * T);
      UNROLL for (int h = 0; h < H; ++h) {
        UNROLL for (int t = 0; t < T; ++t) {
          float* total = out + (h * T + t) * kLanes;
          store(total, Panel::accumulate(load(total), sums[h][t], panel, block, half + h));
        }
      }
    }
  }
}

// SwiGLU as gpt-oss has it: gate clamped above, up on both sides; gate * sigmoid(1.702 gate) * (up + 1).
INLINE F32 swiglu(F32 gate, F32 up, float limit) {
  gate = min(set1(limit), gate);
  up = max(set1(-limit), min(set1(limit), up));
  F32 sigmoid = div(set1(1.f), add(set1(1.f), exp(mul(set1(-1.702f), gate))));
  return mul(mul(gate, sigmoid), add(up, set1(1.f)));
}

// Copies bias[first .. first + 32), zero past the last row.
INLINE void load_bias(float* out, const float* bias, int64_t first, int64_t rows) {
  for (int64_t i = 0; i < 32; ++i) out[i] = bias && first + i < rows ? bias[first + i] : 0.f;
}

// totals: [2][n][16], 32 outputs of n tokens; token t is row out_rows[first + t].
static void write_rows(const MatmulArgs& a, const float* totals, int64_t panel, int64_t first, int64_t n) {
  float bias[32];
  const int64_t row = panel * 32, n_rows = a.rows - row < 32 ? a.rows - row : 32;
  load_bias(bias, a.bias, row, a.rows);
  for (int64_t t = 0; t < n; ++t) {
    float* out = a.out + (a.out_rows ? a.out_rows[first + t] : first + t) * a.out_stride + row;
    const F32 weight = set1(a.out_weights ? a.out_weights[first + t] : 1.f);
    for (int64_t half = 0; half < 2; ++half) {
      F32 value = add(load(totals + (half * n + t) * kLanes), load(bias + 16 * half));
      float tail[16];
      float* target = n_rows == 32 ? out + 16 * half : tail;
      if (n_rows < 32)
        for (int64_t i = 0; i < 16; ++i) tail[i] = 16 * half + i < n_rows ? out[16 * half + i] : 0.f;
      if (a.epilogue == Epilogue::kAdd) value = fma(weight, value, load(target));
      store(target, value);
      if (n_rows < 32)
        for (int64_t i = 0; i < 16 && 16 * half + i < n_rows; ++i) out[16 * half + i] = tail[i];
    }
  }
}

// Fetches the rows that write_rows will add to: they are far apart, and the tile would wait for them when it is done.
INLINE void fetch_rows(const MatmulArgs& a, int64_t panel, int64_t first, int64_t n) {
  for (int64_t t = 0; t < n; ++t) {
    const float* out = a.out + (a.out_rows ? a.out_rows[first + t] : first + t) * a.out_stride + panel * 32;
    __builtin_prefetch(out);
    __builtin_prefetch(out + 16);
  }
}

// The same with 16 gates, then 16 ups; in the checkpoint they alternate.
INLINE void load_gate_up_bias(float* out, const float* bias, int64_t panel, int64_t rows) {
  float rows_of_panel[32];
  load_bias(rows_of_panel, bias, panel * 32, rows);
  for (int64_t i = 0; i < 16; ++i) out[i] = rows_of_panel[2 * i], out[16 + i] = rows_of_panel[2 * i + 1];
}

// totals: 16 gates and 16 ups of n tokens -> inputs 16 panel .. of a tile [I/2][n][2].
static void write_swiglu(const MatmulArgs& a, const float* totals, int64_t panel, int64_t first, int64_t n) {
  float bias[32];
  load_gate_up_bias(bias, a.bias, panel, a.rows);
  Packed* tile = (Packed*)a.packed_out + first * (a.rows / 2);
  for (int64_t t = 0; t < n; ++t) {
    F32 gate = add(load(totals + t * kLanes), load(bias));
    F32 up = add(load(totals + (n + t) * kLanes), load(bias + 16));
    put_in_tile(tile, panel * 16, t, n, swiglu(gate, up, a.swiglu_limit));
  }
}

template <class P>
struct FloatProduct {
  using Panel = P;
  static constexpr TileSizes kTiles = {kTile, kTile};

  template <int T>
  static void multiply(const MatmulArgs& a, const uint8_t* data, int64_t panel, int64_t first, Ahead ahead) {
    alignas(64) float totals[2 * T * kLanes];
    const Packed* x = (const Packed*)a.packed + first * a.cols;
    if (a.epilogue == Epilogue::kAdd) fetch_rows(a, panel, first, T);
    panel_times_tile<Panel, T>(totals, Panel::at(data, a.cols), x, a.cols, ahead);
    if (a.epilogue == Epilogue::kSwiglu)
      write_swiglu(a, totals, panel, first, T);
    else
      write_rows(a, totals, panel, first, T);
  }
};

template <class Product, int T>
static void multiply_tile(const MatmulArgs& a, const uint8_t* data, int64_t panel, int64_t first, int64_t n, Ahead ahead) {
  if constexpr (T > 0) {
    if (n == T) return Product::template multiply<T>(a, data, panel, first, ahead);
    multiply_tile<Product, T - 1>(a, data, panel, first, n, ahead);
  }
}

// Where a panel meets one tile, so far ahead in the stream that it lies in is fetched; unless the processor's own prefetcher
// does better, as measured for tiles of n tokens: fetches_stream(n).
constexpr int64_t kStreamAhead = 16384;

template <class Product>
static void multiply_panels(const MatmulArgs& a) {
  using gptoss::cpu::tile_start;
  using Panel = typename Product::Panel;
  const int64_t bytes = Panel::bytes(a.cols), blocks = gptoss::cpu::round_up(a.cols, Panel::kInputs) / Panel::kInputs;
  const int64_t n_tiles = gptoss::cpu::n_tiles(a.n_tokens, Product::kTiles);
  const int64_t step = gptoss::cpu::round_up(bytes / (n_tiles * blocks), 64);
  for (int64_t panel = a.first_panel; panel < a.first_panel + a.n_panels; ++panel) {
    const uint8_t* data = a.panels + panel * bytes;
    const uint8_t* next = panel + 1 < a.first_panel + a.n_panels ? data + bytes : a.next;
    for (int64_t i = 0; i < n_tiles; ++i) {
      const int64_t first = tile_start(a.n_tokens, n_tiles, i), n = tile_start(a.n_tokens, n_tiles, i + 1) - first;
      Ahead ahead;  // the next panel, spread over all tiles
      if (n_tiles > 1 && next && i * blocks * step < bytes) ahead = {next + i * blocks * step, step};
      if (n_tiles == 1 && Panel::fetches_stream(n)) ahead = {data + kStreamAhead, step};
      multiply_tile<Product, Product::kTiles.alone>(a, data, panel, first, n, ahead);
    }
  }
}

static void matmul(const MatmulArgs& a) {
  if (a.mxfp4)
    multiply_panels<FloatProduct<Mxfp4Panel>>(a);
  else
    multiply_panels<FloatProduct<Bf16Panel>>(a);
}

}  // namespace
