// The kernels as the backend sees them: one host function each that chooses a shape of launch and starts it on a stream.
// All pointers are device memory. Nothing here allocates or waits.
#pragma once
#include <cstdint>
#include <vector>

#include "cuda/common.cuh"
#include "sampling.h"
#include "tensor.h"

namespace gptoss::cuda {

// Activations of a product: bfloat16, rows padded with zeros to a multiple of 64.
struct Rounded {
  uint16_t* data = nullptr;  // [rows, stride]
  int64_t stride = 0;
};

// Up to kRowBlock rows of one sequence, one after the other, that attention takes together.
struct RowBlock {
  int32_t first, n;
};
inline constexpr int kRowBlock = 16;
inline constexpr int64_t kFewRows = 8;  // new rows of a sequence that attention takes one by one

// The integers of a batch. Page of position p for sequence s: pages[base[s] + p / 128].
struct DeviceBatch {
  const int32_t* tokens = nullptr;       // [n]
  const int32_t* positions = nullptr;    // [n]
  const int32_t* sequence_of = nullptr;  // [n]
  const int32_t* full_base = nullptr;    // [sequences]
  const int32_t* window_base = nullptr;  // [sequences]
  const int32_t* pages = nullptr;
  const int32_t* n_rows = nullptr;  // [1] how many rows are real, the rest pad the batch; null: all
  // Every row is in one of the two, for attention.
  const RowBlock* row_blocks = nullptr;  // [n_row_blocks]
  const int32_t* single_rows = nullptr;  // [n_single_rows], null: 0, 1, 2 ..
  int64_t n_row_blocks = 0, n_single_rows = 0;
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

// Where rotated queries, keys and values go.
struct RopeArgs {
  float* q = nullptr;          // [n, heads * 64]
  uint16_t* keys = nullptr;    // [pages, kv_heads, 128, 64]
  uint16_t* values = nullptr;  // [pages, kv_heads, 64, 128]
  const float* cos = nullptr;  // [positions, 32]
  const float* sin = nullptr;  // [positions, 32]
  DeviceBatch batch;
  bool window = false;
  int32_t heads = 0, kv_heads = 0;
};

void rope_append(const RopeArgs& args, const float* qkv, int64_t n,
                 cudaStream_t stream);  // qkv: [n, (heads + 2 kv_heads) * 64]

// --- matmul.cu ------------------------------------------------------------------------------------------------------
enum class Epilogue {
  kStore,
  kAdd,      // bfloat16 only, as the model has it
  kSwiglu,   // MXFP4 only
  kRope,     // bfloat16 only: rotated, and into the cache. Tiles of 8 also norm their inputs first
  kCombine,  // MXFP4 only: the experts' outputs, weighted and added to the residual in the order of the choices
};

// Up to `n` rows of the input that meet the same expert's matrix.
struct TokenTile {
  int32_t expert, first, n;
};

struct MatmulArgs {
  const uint8_t* codes = nullptr;   // [experts, rows / 16, cols / 64] blocks of 16 x 64 weights, see weights.cu
  const uint8_t* scales = nullptr;  // [experts, rows / 16, cols / 64, 8, 4], MXFP4 only
  int64_t rows = 0, cols = 0;       // of one expert's matrix
  Rounded x;                        // inputs
  int64_t n = 0;                    // tokens: rows of inputs, or of what they are gathered from
  const float* bias = nullptr;      // [experts, rows] or null
  float* out = nullptr;             // [n, rows]; kCombine: the residual stream
  RowOrder order = RowOrder::kPlain;
  // Grouped by expert where tiles is not null: tile t is rows first .. first + n of the sorted slots.
  const TokenTile* tiles = nullptr;
  const int32_t* n_tiles = nullptr;  // on the device
  int64_t max_tiles = 0;             // that there can be
  const int32_t* slots = nullptr;    // [slots] token * k + choice, sorted by expert
  int32_t choices = 0;               // k
  const int32_t* n_rows = nullptr;   // [1] tokens that are real: only they have slots. null: all
  bool gather = false;               // slot s reads row slots[s] / k, not s
  // kSwiglu
  Rounded hidden;  // [slots, rows / 2]
  float limit = 0;
  // kRope
  RopeArgs rope;
  const float* residual = nullptr;     // [n, cols] what is normed, for tiles of 8, which do not read x
  const float* norm_weight = nullptr;  // [cols]
  float eps = 0;
  // kCombine
  float* parts = nullptr;         // [slots, rows] by token and choice
  const float* shares = nullptr;  // [n, k]
  unsigned* counters = nullptr;   // [combine_counters]
};

// Tokens a tile takes. cols: inputs, of the larger matrix if there are two.
inline constexpr int64_t kNarrowTile = 8, kWideTile = 64;
int64_t matmul_tile(int64_t tokens_a_matrix, int64_t cols);
int64_t combine_counters(int64_t n, int64_t rows, int64_t tile);
void matmul(const MatmulArgs& args, bool mxfp4, Epilogue epilogue, int64_t tile, cudaStream_t stream);

// --- hopper.cu ------------------------------------------------------------------------------------------------------
// The same products for many tokens on a card of compute capability 9.0. Inputs are rows of `x` packed by hopper_pack, one for
// each row of the result (MatmulArgs::gather is not looked at); kSwiglu leaves its result packed. kCombine is two kernels, and
// needs no counters.
inline constexpr int64_t kHopperTokens = 128;        // of a tile
bool hopper_pays(int64_t tokens, int64_t matrices);  // that share the tokens among them
// Row i of packed [n, x.stride] is row i of x, or where gather is not 0 row slots[i] / gather; then only the first *n_rows *
// gather are there, where n_rows is not null.
void hopper_pack(Rounded packed, Rounded x, const int32_t* slots, int32_t gather, const int32_t* n_rows, int64_t n,
                 cudaStream_t stream);
void hopper_matmul(const MatmulArgs& args, bool mxfp4, Epilogue epilogue, int multiprocessors, cudaStream_t stream);

// --- weights.cu -----------------------------------------------------------------------------------------------------
// The checkpoint's row that is row r of block `block` of 16: rows r and r + 8 are one lane's, and go together where the order
// says that rows do.
__host__ __device__ constexpr int source_row(RowOrder order, int block, int r) {
  if (order == RowOrder::kGateUp) return block * 16 + r % 8 * 2 + r / 8;
  if (order == RowOrder::kRopePairs) return block / 4 * 64 + block % 4 * 8 + r % 8 + r / 8 * 32;
  return block * 16 + r;
}

int64_t arranged_bytes(bool mxfp4, int64_t experts, int64_t rows, int64_t cols);  // codes and scales
int64_t arranged_scales_offset(int64_t experts, int64_t rows, int64_t cols);      // where an MXFP4 weight's scales begin
// Source rows first_row .. first_row + n of one expert's matrix; first_row is a multiple of kArrangedRows (of 16, where the
// order is not kRopePairs), n too unless it ends the matrix.
inline constexpr int64_t kArrangedRows = 64;
void arrange_bf16(uint8_t* codes, const uint16_t* source, int64_t first_row, int64_t n, int64_t cols, RowOrder order,
                  cudaStream_t stream);
void arrange_mxfp4(uint8_t* codes, const uint8_t* source, int64_t first_row, int64_t n, int64_t cols, RowOrder order,
                   cudaStream_t stream);
void arrange_scales(uint8_t* scales, const uint8_t* source, int64_t first_row, int64_t n, int64_t cols, RowOrder order,
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
  int64_t heads = 0, kv_heads = 0, window = 0;
  int64_t max_pages = 0;        // that one row can see, at most
  int64_t multiprocessors = 0;  // of the card
  void* workspace = nullptr;    // [workspace_bytes] all zero before it is first used
  int64_t workspace_bytes = 0;
};

// For steps of up to max_rows rows by themselves; in less, or none, attention works too, with fewer blocks.
int64_t attention_workspace_bytes(int64_t max_rows, int64_t heads, int64_t kv_heads, int64_t max_context);
void attention(const AttentionArgs& args, cudaStream_t stream);

// --- moe.cu ---------------------------------------------------------------------------------------------------------
struct DispatchArgs {
  int32_t* slots = nullptr;    // [n k] token * k + choice, sorted by expert; those of none are left out
  TokenTile* tiles = nullptr;  // [max_tiles]
  int32_t* n_tiles = nullptr;  // [1]
  int32_t tile = 0;            // slots of one, at most
};

struct RouteArgs {
  int32_t* ids = nullptr;            // [n, k]; of rows that are not real, `experts`, which stands for none
  float* weights = nullptr;          // [n, k]
  const float* x = nullptr;          // [n, hidden] normed rows, or the residual stream where norm_weight is not null
  const uint16_t* router = nullptr;  // [experts, hidden]
  const float* bias = nullptr;       // [experts]
  int64_t n = 0, hidden = 0, experts = 0, k = 0;
  const int32_t* n_rows = nullptr;  // [1] how many rows are real; null: all
  float* logits = nullptr;          // [n, experts] work space
  unsigned* counters = nullptr;     // [n + 1]
  // The norm before, whose result is written too.
  const float* norm_weight = nullptr;  // [hidden]
  float eps = 0;
  float* t = nullptr;  // [n, hidden]
  Rounded rounded;     // the same
  // Also sorts the slots where this is not null: routes_and_dispatches() says whether it may.
  DispatchArgs dispatch;
};

bool routes_and_dispatches(int64_t n_slots);
void route(const RouteArgs& args, cudaStream_t stream);
int64_t max_tiles(int64_t n_slots, int64_t experts, int64_t tile);
void dispatch(const DispatchArgs& args, const int32_t* ids, int64_t n_slots, int64_t experts, cudaStream_t stream);

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
  int32_t mask = -1;                                // which of the masks; -1: none
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

// Before the launch: the parameters of a row, and its adjustments and its mask, if it has one, added to those of all rows.
SampleParams stage_sample(std::vector<StagedAdjustment>& adjustments, std::vector<const uint32_t*>& masks,
                          const Sampler& sampler, int64_t row, int64_t position);
// After it, on the host; throws what Sampler::sample does.
Sample finish_sample(const SampleResult& result, const Sampler& sampler);

int64_t sample_workspace_bytes(int64_t n, int64_t vocab);
// One result for each of n rows, or of the first *n_rows where that is not null; the launches depend on n and vocab alone. The
// logits are changed and put back.               results, params: [n]   logits: [rows, vocab]   n_rows: [1], on the device
//                                                masks: [any, ceil(vocab / 32)], as Sampler::mask
void sample(SampleResult* results, float* logits, const SampleParams* params, StagedAdjustment* adjustments,
            const uint32_t* masks, void* workspace, const int32_t* n_rows, int64_t n, int64_t vocab, cudaStream_t stream);

}  // namespace gptoss::cuda
