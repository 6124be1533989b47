// The kernels of one instruction set: plain functions on raw pointers and plain argument structs.
//
// Weight panels. A matrix is cut into panels of 32 output rows, and a panel holds its inputs side by side, so that one load
// feeds 16 lanes, one lane an output row, and a panel is read as one sequential stream:
//   bfloat16:  [K/2 pairs][32 rows][2]                                      128 bytes a pair of inputs
//   MXFP4:     [K/32 scales][32 rows], padded to 64 bytes, then [K/8][32 rows][4 bytes]; the low half of a row's 4 bytes
//              holds the codes of inputs 0 2 4 6, the high half those of 1 3 5 7 (so that the two halves make bfloat16 pairs)
//   int8:      blocks of 64 inputs (the last may lack 32: they are zeros): [32 rows] bfloat16 scales and [16 quads][32 rows]
//              [4 bytes], each a code plus 128 (avx2: the code); the two quads of 8 inputs are 0 4 1 5 and 2 6 3 7, the
//              order in which MXFP4 nibbles come as bytes
// In gate_up matrices the 32 rows of a panel are its 16 gates, then its 16 ups.
//
// Packed tokens. The other operand is cut into tiles of up to `tile` tokens (up to `alone`, if it is the only one), as alike in
// size as can be: [K/2 pairs][tokens of the tile][2], elements rounded to bfloat16, stored as bfloat16 (packed_bytes 2) or as
// the equal float32 (packed_bytes 4). In products of bytes (precision "fast"): [tokens] float32 that sums start from, 0 or not
// a number, then K/32 blocks of [tokens] float32 scales, [tokens] int32 corrections (minus the sum of the codes times what the
// weights' bytes are offset by, 12 or 128; avx2: 12, an int16 for the first two inputs of all quads and one for the last two,
// or 0), and [8 quads][tokens][4] int8 codes. In an FP4 product the bits of a scale are those of half of it (the weights' bytes
// are twice the values) less 127 << 23: a block's scale byte << 23 added to them makes the product of both scales.
//
// Every output is  sum over blocks of 32 inputs ( scale * sum over 16 pairs in order ), whatever the number of tokens, so a
// token's result never depends on the tile it came in. In products of bytes the 32 are summed in int32, without any rounding.
#pragma once
#include <cstdint>

namespace gptoss::cpu {

inline constexpr int64_t kPanelRows = 32;
inline constexpr int64_t kMaxGroup = 8;      // query heads of one attention call
inline constexpr int64_t kChunkKeys = 256;   // keys of one partial softmax, aligned to absolute positions
inline constexpr int64_t kStateFloats = 66;  // what a chunk comes to for one query head: weighted values, maximum, sum

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
constexpr int64_t bf16_panel_bytes(int64_t cols) { return cols * kPanelRows * 2; }
constexpr int64_t mxfp4_scale_bytes(int64_t cols) { return round_up(cols / 32 * kPanelRows, 64); }
constexpr int64_t mxfp4_panel_bytes(int64_t cols) { return mxfp4_scale_bytes(cols) + cols / 2 * kPanelRows; }
inline constexpr int64_t kInt8Block = 64;  // inputs of int8 weights to a scale
inline constexpr int64_t kInt8BlockBytes = kPanelRows * (2 + kInt8Block);
constexpr int64_t int8_panel_bytes(int64_t cols) { return round_up(cols, kInt8Block) / kInt8Block * kInt8BlockBytes; }
// Of a token's block: scale, correction, codes.
constexpr int64_t int8_token_block_bytes(int64_t inputs) { return 4 + 4 + inputs; }
constexpr int64_t int8_token_bytes(int64_t cols, bool mxfp4) {
  const int64_t inputs = mxfp4 ? 32 : kInt8Block;
  return 4 + round_up(cols, inputs) / inputs * int8_token_block_bytes(inputs);
}
// Scale bytes of MXFP4 weights in products of bytes: 2^-60 to 2^60, so that a product of scales is a normal number.
inline constexpr uint8_t kLeastInt8Scale = 127 - 60, kMostInt8Scale = 127 + 60;

// Tile i of n tokens has those from tile_start(i) to tile_start(i + 1).
struct TileSizes {
  int64_t tile;   // tokens of a full tile
  int64_t alone;  // of one that meets its panel alone: weights then come from memory, which more than one tile would wait for
};
constexpr int64_t n_tiles(int64_t n, TileSizes sizes) { return n <= sizes.alone ? 1 : (n + sizes.tile - 1) / sizes.tile; }
constexpr int64_t tile_start(int64_t n, int64_t tiles, int64_t i) { return n * i / tiles; }

enum class Epilogue {
  kStore,   // out[token][row] = sum + bias
  kAdd,     // out[token][row] += token_weight * (sum + bias)
  kSwiglu,  // packed_out[row / 2][token] = swiglu(gate, up), for a following product; in products of bytes out[token][row / 2]
};

// Panels [first_panel, first_panel + n_panels) of one matrix times every token tile.
struct MatmulArgs {
  const uint8_t* panels = nullptr;  // first panel of the matrix
  bool mxfp4 = false;
  int64_t rows = 0;  // outputs; those past it in the last panel are padding
  int64_t cols = 0;  // K
  int64_t first_panel = 0;
  int64_t n_panels = 0;
  const void* packed = nullptr;  // a tile starts where its first token would in rows of cols elements (of int8_token_bytes)
  int64_t n_tokens = 0;
  const uint8_t* next = nullptr;  // the panel that this thread multiplies next, null: not known; it is fetched meanwhile
  const float* bias = nullptr;    // [rows] or null
  Epilogue epilogue = Epilogue::kStore;
  float* out = nullptr;                // token t writes out + out_rows[t] * out_stride
  int64_t out_stride = 0;              // floats
  const int32_t* out_rows = nullptr;   // [n_tokens], null: t
  const float* out_weights = nullptr;  // [n_tokens], null: 1
  void* packed_out = nullptr;          // kSwiglu: tiles of rows/2 inputs
  float swiglu_limit = 0;
};

// One token, the query heads of one key/value head, keys [first_key, end_key) of its sequence.
struct AttentionArgs {
  float* out = nullptr;           // [group, 64]
  const float* q = nullptr;       // [group, 64]
  int64_t group = 0;              // 1..kMaxGroup
  const float* sinks = nullptr;   // [group]
  const uint8_t* keys = nullptr;  // the pool, at this key/value head: page p is at p * page_bytes
  const uint8_t* values = nullptr;
  int64_t page_bytes = 0;
  const int32_t* pages = nullptr;  // page of positions [128 (first_page + i), ...) is pages[i]
  int64_t first_page = 0;
  int64_t first_key = 0;
  int64_t end_key = 0;
  float* states = nullptr;  // [chunks that these keys lie in][group * kStateFloats]
};

struct KernelTable {
  const char* name;
  TileSizes tiles;
  int64_t packed_bytes;  // of one packed element

  // source: [rows of cols] bfloat16, n_rows <= 32; missing rows become zero.
  void (*pack_bf16_panel)(uint8_t* panel, const uint16_t* source, int64_t n_rows, int64_t cols, bool gate_up);
  void (*pack_mxfp4_blocks)(uint8_t* panel, const uint8_t* blocks, int64_t n_rows, int64_t cols, bool gate_up);
  void (*pack_mxfp4_scales)(uint8_t* panel, const uint8_t* scales, int64_t n_rows, int64_t cols, bool gate_up);

  // Rounds rows of x to bfloat16 and packs them as one tile. rows: [n] or null for 0, 1, ...
  void (*pack_tokens)(void* tile, const float* x, int64_t stride, const int32_t* rows, int64_t n, int64_t cols);
  void (*matmul)(const MatmulArgs& args);

  // The same for products of bytes; they round to int8.
  TileSizes int8_tiles;
  void (*pack_int8_panel)(uint8_t* panel, const uint16_t* source, int64_t n_rows, int64_t cols);
  void (*pack_tokens_int8)(void* tile, const float* x, int64_t stride, const int32_t* rows, int64_t n, int64_t cols,
                           bool mxfp4);
  void (*matmul_int8)(const MatmulArgs& args);

  void (*embed)(float* out, const uint16_t* row, int64_t n);
  void (*rmsnorm)(float* out, const float* x, const float* weight, float eps, int64_t n);
  // out[e] = sum_i t[i] weight[e][i] + bias[e], all float32
  void (*router)(float* out, const float* t, const uint16_t* weight, const float* bias, int64_t n_experts, int64_t n);
  // Rotates one head: out = rotate(x); cos, sin: [32]
  void (*rope)(float* out, const float* x, const float* cos, const float* sin);
  // Writes one head's key (rounded) as key `slot` of a page, [8][32 pairs][16 keys][2], and its value, [128][2][16][2]: of 32
  // numbers the first 16 lie beside the second, so that a load makes two vectors of 16 with a shift and a mask.
  void (*append)(uint16_t* key_page, uint16_t* value_page, int64_t slot, const float* key, const float* value);
  void (*attention)(const AttentionArgs& args);
  // The same in two: states of chunks, for all keys or for whole chunks of them; then what those of all keys come to.
  void (*attention_states)(const AttentionArgs& args);
  void (*attention_join)(const AttentionArgs& args);
};

}  // namespace gptoss::cpu

// One symbol an instruction set; everything else in kernels/ has internal linkage.
extern "C" {
extern const gptoss::cpu::KernelTable gptoss_kernels_scalar;
extern const gptoss::cpu::KernelTable gptoss_kernels_avx2;
extern const gptoss::cpu::KernelTable gptoss_kernels_avxvnni;
extern const gptoss::cpu::KernelTable gptoss_kernels_avx512;
extern const gptoss::cpu::KernelTable gptoss_kernels_avx512bf16;
}
