// The kernels as the backend sees them: one host function each that chooses a shape of launch and starts it on a stream.
// All pointers are device memory. Nothing here allocates or waits.
#pragma once
#include <cstdint>
#include <vector>

#include "cuda/common.cuh"
#include "sampling.h"

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
  const int32_t* n_rows = nullptr;  // [1] rows that are real; those after them fill up a batch, see Backend::run
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

// --- sample.cu ------------------------------------------------------------------------------------------------------
inline constexpr int kTopLogprobs = 32;  // most that the card gives; a sampler that wants more is the host's work

// What the kernels need of a Sampler and a position.
struct SampleParams {
  int64_t row = 0;  // of the logits; no two alike
  float scale = 1;  // 1 / temperature
  int32_t greedy = 0;
  int32_t top_k = 0;  // 0: all
  int32_t logprobs = -1;
  double top_p = 1;
  double min_gap = 0;  // temperature * log(min_p)
  double uniform = 0;  // the random number
  Penalties penalties;
  int32_t first_adjustment = 0, n_adjustments = 0;  // in the list of all rows', by token
};

struct StagedAdjustment {
  TokenAdjustment by;
  float logit = 0;  // as it was given; written and read by the kernels
};

struct SampleResult {
  int32_t token;   // -1: the adjusted logits have no finite maximum
  int32_t n_nans;  // if not 0, there is no token either
  float top;       // the maximum
  float logit;     // the token's, as it was given. From here on only where log-probabilities are wanted
  double log_sum;  // of the exponentials of all
  int32_t top_ids[kTopLogprobs];
  float top_logits[kTopLogprobs];
};

// Before the launch: the parameters of a row, and its adjustments added to the list of all rows'.
SampleParams stage_sample(std::vector<StagedAdjustment>& adjustments, const Sampler& sampler, int64_t row, int64_t position);
// After it, on the host; throws what Sampler::sample does.
Sample finish_sample(const SampleResult& result, const Sampler& sampler);

int64_t sample_workspace_bytes(int64_t n, int64_t vocab);
// One result for each of n rows, or of the first *n_rows where that is not null; the launches depend on n and vocab alone. The
// logits are changed and put back.               results, params: [n]   logits: [rows, vocab]   n_rows: [1], on the device
void sample(SampleResult* results, float* logits, const SampleParams* params, StagedAdjustment* adjustments, void* workspace,
            const int32_t* n_rows, int64_t n, int64_t vocab, cudaStream_t stream);

}  // namespace gptoss::cuda
