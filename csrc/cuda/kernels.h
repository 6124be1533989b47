// The kernels as the backend sees them: one host function each that chooses a shape of launch and starts it on a stream.
// All pointers are device memory. Nothing here allocates or waits.
#pragma once
#include <cstdint>

#include "cuda/common.cuh"

namespace gptoss::cuda {

// Activations of a product: bfloat16, rows padded with zeros to a multiple of 64.
struct Rounded {
  uint16_t* data = nullptr;  // [rows, stride]
  int64_t stride = 0;
};

// The integers of a batch. Page of position p for sequence s: pages[base[s] + p / 128].
struct DeviceBatch {
  const int32_t* tokens = nullptr;       // [n]
  const int32_t* positions = nullptr;    // [n]
  const int32_t* sequence_of = nullptr;  // [n]
  const int32_t* full_base = nullptr;    // [sequences]
  const int32_t* window_base = nullptr;  // [sequences]
  const int32_t* pages = nullptr;
};

// --- pointwise.cu ---------------------------------------------------------------------------------------------------
struct RowList {
  static constexpr int kMax = 64;
  int32_t rows[kMax];
};

void embed(float* x, const int32_t* tokens, const uint16_t* table, int64_t n, int64_t hidden, cudaStream_t stream);
// Also writes the rounded rows. `rows` gives the source rows where it is not null.
void rmsnorm(float* t, Rounded rounded, const float* x, const float* weight, float eps, int64_t n, int64_t hidden,
             const RowList* rows, cudaStream_t stream);
void round_rows(Rounded rounded, const float* x, int64_t n, int64_t cols, cudaStream_t stream);
void rope_append(float* q, uint16_t* keys, uint16_t* values, const float* qkv, const float* cos, const float* sin,
                 const DeviceBatch& batch, bool window, int64_t n, int64_t heads, int64_t kv_heads, cudaStream_t stream);

// --- matmul.cu ------------------------------------------------------------------------------------------------------
enum class Epilogue { kStore, kAdd, kSwiglu };

// Up to `n` rows of the input that meet the same expert's matrix.
struct TokenTile {
  int32_t expert, first, n;
};

struct MatmulArgs {
  const uint8_t* codes = nullptr;   // [experts, rows / 16, cols / 64] blocks of 16 x 64 weights, see weights.cu
  const uint8_t* scales = nullptr;  // [experts, rows / 16, cols / 64, 8, 4], MXFP4 only
  int64_t rows = 0, cols = 0;       // of one expert's matrix
  Rounded x;                        // inputs
  int64_t n = 0;                    // rows of them
  const float* bias = nullptr;      // [experts, rows] or null
  float* out = nullptr;             // [n, rows]
  Rounded hidden;                   // kSwiglu: [n, rows / 2]
  float limit = 0;
  // Grouped by expert where tiles is not null: tile t is rows first .. first + n of the sorted slots.
  const TokenTile* tiles = nullptr;
  const int32_t* n_tiles = nullptr;  // on the device
  int64_t max_tiles = 0;             // that there can be
  const int32_t* slots = nullptr;    // [slots] token * k + choice, sorted by expert
  int32_t gather = 0;                // k: slot s reads row slots[s] / k.  0: row s
  bool scatter = false;              // slot s writes row slots[s], not s
};

int64_t matmul_tile(int64_t tokens_a_matrix);  // tokens a tile takes: 8 or 64
void matmul(const MatmulArgs& args, bool mxfp4, Epilogue epilogue, int64_t tile, cudaStream_t stream);

// --- hopper.cu ------------------------------------------------------------------------------------------------------
// The same products for many tokens on a card of compute capability 9.0. Inputs are rows of `x` packed by hopper_pack, one for
// each row of the result (MatmulArgs::gather is not looked at); kSwiglu leaves its result packed.
inline constexpr int64_t kHopperTokens = 128;        // of a tile
bool hopper_pays(int64_t tokens, int64_t matrices);  // that share the tokens among them
// Row i of packed [n, x.stride] is row slots[i] / gather of x where gather is not 0, else row i.
void hopper_pack(Rounded packed, Rounded x, const int32_t* slots, int32_t gather, int64_t n, cudaStream_t stream);
void hopper_matmul(const MatmulArgs& args, bool mxfp4, Epilogue epilogue, int multiprocessors, cudaStream_t stream);

// --- weights.cu -----------------------------------------------------------------------------------------------------
int64_t arranged_bytes(bool mxfp4, int64_t experts, int64_t rows, int64_t cols);  // codes and scales
int64_t arranged_scales_offset(int64_t experts, int64_t rows, int64_t cols);      // where an MXFP4 weight's scales begin
// Source rows first_row .. first_row + n of one expert's matrix; first_row is a multiple of 16, n too unless it ends the
// matrix.
void arrange_bf16(uint8_t* codes, const uint16_t* source, int64_t first_row, int64_t n, int64_t cols, cudaStream_t stream);
void arrange_mxfp4(uint8_t* codes, const uint8_t* source, int64_t first_row, int64_t n, int64_t cols, bool gate_up,
                   cudaStream_t stream);
void arrange_scales(uint8_t* scales, const uint8_t* source, int64_t first_row, int64_t n, int64_t cols, bool gate_up,
                    cudaStream_t stream);

// --- attention.cu ---------------------------------------------------------------------------------------------------
struct AttentionArgs {
  float* out = nullptr;  // [n, heads * 64]
  Rounded rounded;       // the same
  const float* q = nullptr;
  const uint16_t* keys = nullptr;    // [pages, kv_heads, 128, 64]
  const uint16_t* values = nullptr;  // [pages, kv_heads, 64, 128]
  const float* sinks = nullptr;      // [heads]
  DeviceBatch batch;
  int64_t n = 0, heads = 0, kv_heads = 0, window = 0;
  int64_t max_pages = 0;     // that one row can see
  float* partial = nullptr;  // [partial_bytes]
};

int64_t attention_partial_bytes(const AttentionArgs& args);  // work space; 0 where keys are not split
void attention(const AttentionArgs& args, cudaStream_t stream);

// --- moe.cu ---------------------------------------------------------------------------------------------------------
void route(int32_t* ids, float* weights, const float* t, const uint16_t* router, const float* bias, int64_t n, int64_t hidden,
           int64_t experts, int64_t k, cudaStream_t stream);
void dispatch(int32_t* slots, TokenTile* tiles, int32_t* n_tiles, const int32_t* ids, int64_t n_slots, int64_t experts,
              int64_t tile, cudaStream_t stream);
void combine(float* x, const float* outputs, const float* weights, int64_t n, int64_t k, int64_t hidden, cudaStream_t stream);

}  // namespace gptoss::cuda
