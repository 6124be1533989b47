// What a backend does: memory, weights in its own arrangement, and a dozen coarse operations.
//
// The model (model.cpp) is written once against this interface. Choosing a kernel for one token or a thousand, grouping
// tokens by expert and rounding operands happen below it. Operations run in order on the backend's one stream. None takes
// memory, and none waits for the stream's work but take_samples, which brings the tokens to the host: so a step of a known kind
// can be recorded and replayed. Outputs come first, then inputs. Activations are float32; an operation that multiplies matrices
// rounds its activations to bfloat16 (or int8, as the precision says) itself and sums in float32.
//
// The result of a row depends on its own sequence alone, bit for bit: not on other rows, not on how a prompt was cut into
// steps, not on the number of threads. One exception: products of many tokens on sm_90, unless BackendOptions::invariant.
#pragma once
#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "batch.h"
#include "config.h"
#include "sampling.h"
#include "tensor.h"

namespace gptoss {

// One layer's keys and values: a pool of pages of 128 tokens, arranged as the backend likes.
struct KvLayer {
  void* keys = nullptr;    // [n_pages, page_bytes]
  void* values = nullptr;  // [n_pages, page_bytes]
  int64_t window = 0;      // 0: none. Tells also which page list of a sequence to use
};

// Cosines and sines of every position, already times the attention factor.
struct RopeTable {
  Mat<const float> cos;  // [positions, head_dim / 2]
  Mat<const float> sin;  // [positions, head_dim / 2]
};

// What a norm multiplies by, and adds under its root.
struct Norm {
  const float* weight = nullptr;  // [H]
  float eps = 0;
};

struct ExpertWeights {
  const Weight* gate_up = nullptr;      // [E, 2I, H] MXFP4, rows alternate gate, up
  const float* gate_up_bias = nullptr;  // [E, 2I]
  const Weight* down = nullptr;         // [E, H, I] MXFP4
  const float* down_bias = nullptr;     // [E, H]
  float swiglu_limit = 0;
};

struct Routing {
  Mat<int32_t> experts;  // [n, k] ids, best first
  Mat<float> weights;    // [n, k] softmax over the k
};

// The next token of one sequence, drawn from one row of logits.
struct SampleRequest {
  int64_t row = 0;
  const Sampler* sampler = nullptr;
  int64_t position = 0;  // of the new token in its sequence
  // Not -1: the row follows a guess of what the request before it draws, and is wanted only if that came true.
  int32_t guess = -1;
  size_t item = 0;  // of the step: whose it is
};

// The most a model can be asked for; what its memory is planned by.
struct Limits {
  int64_t batch_tokens = 0;  // rows of a step
  int64_t sequences = 0;     // of a step, and with pages in the cache
  int64_t context = 0;       // tokens of a sequence

  // Rows of logits that are there at once: of a batch of single tokens all, of a prompt so many.
  static constexpr int64_t kPromptLogitRows = 64;  // 51 MB for the real vocabulary
  int64_t logit_rows() const { return std::max(kPromptLogitRows, std::min(batch_tokens, sequences)); }
};

enum class Precision {
  kExact,  // weights as the checkpoint has them, bfloat16 operands
  kFast,   // attention and unembedding weights in 8 bits, int8 operands; only on the CPU so far
};

struct BackendOptions {
  std::string device;            // "cpu", "cuda", "cuda:1"
  int threads = 0;               // 0: as many as this process may use
  std::string isa;               // CPU instruction set to force; empty: GPTOSS_ISA, else the best
  int64_t max_batch_tokens = 0;  // rows of the largest step
  bool invariant = false;        // a row's bits may not depend on the batch even where that costs speed (CUDA on sm_90)
  Precision precision = Precision::kExact;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string device() const = 0;
  virtual std::string isa() const = 0;
  virtual int threads() const = 0;

  // --- memory -----------------------------------------------------------------------------------------------------
  virtual Buffer allocate(size_t bytes) = 0;  // zero-filled
  virtual void copy_in(void* device, const void* host, size_t bytes) = 0;
  virtual void copy_out(void* host, const void* device, size_t bytes) = 0;
  // Bytes that may still be taken; some that others will want are left out.
  virtual size_t available_memory() const = 0;
  // Takes the work space of the operations, once: no step within the limits takes more.
  virtual void reserve(const ModelConfig& config, const Limits& limits) = 0;
  // What reserve would take.
  virtual size_t workspace_bytes(const ModelConfig& config, const Limits& limits) = 0;

  // --- weights ----------------------------------------------------------------------------------------------------
  virtual size_t weight_bytes(WeightFormat format, int64_t experts, int64_t rows, int64_t cols) const = 0;
  virtual Weight make_weight(WeightFormat format, int64_t experts, int64_t rows, int64_t cols, RowOrder order) = 0;
  // rows [first_row, first_row + n) of a kTable or kBf16 weight.   source: bfloat16 [n, cols], host
  virtual void load_rows(Weight& weight, int64_t first_row, const HostTensor& source) = 0;
  // All codes, or all scales, of a kMxfp4 weight.    blocks: [E, rows, cols/32, 16], scales: [E, rows, cols/32] u8, host
  virtual void load_mxfp4_blocks(Weight& weight, const HostTensor& blocks) = 0;
  virtual void load_mxfp4_scales(Weight& weight, const HostTensor& scales) = 0;
  // Waits until all weights are there; what only loading needed goes.
  virtual void finish_loading() = 0;

  // --- one step ---------------------------------------------------------------------------------------------------
  // Stages the batch's integers; the operations below speak of its rows. The batch must outlive the step.
  virtual void begin(const Batch& batch) = 0;

  // Begins the batch and does operations(rows), which must work on as many rows: those of the batch, or more where a backend
  // fills a batch of single tokens up to a size that it has launches for (rows that pad are nobody's; their results mean
  // nothing). For such a batch it may also record what the operations launch and replay that for the next of the same kind;
  // `end` tells apart operations that end differently.
  virtual void run(const Batch& batch, StepEnd, const std::function<void(int64_t rows)>& operations) {
    begin(batch);
    operations(batch.n_tokens());
  }

  // x[i] = table[tokens[i]]                                                        x: [n, H]   table: [V, H]
  virtual void embed(Mat<float> x, const Weight& table) = 0;

  // t = x / sqrt(mean(x^2) + eps) * weight, of the rows given (all where rows is null).   t, x: [n, H]   weight: [H]
  virtual void rmsnorm(Mat<float> t, Mat<const float> x, const float* weight, float eps, const int32_t* rows) = 0;

  // out = t W^T + bias                                        out: [n, M]   t: [n, K]   W: [M, K] kBf16   bias: [M] or null
  virtual void linear(Mat<float> out, Mat<const float> t, const Weight& weight, const float* bias) = 0;

  // x += a W^T + bias
  virtual void linear_add(Mat<float> x, Mat<const float> a, const Weight& weight, const float* bias) = 0;

  // Rotates q and k (YaRN, half-split pairs i and i + 32), rounds k and v to bfloat16 and writes them into the cache.
  //                                                              q: [n, heads*64]   qkv: [n, (heads + 2 kv_heads)*64]
  virtual void rope_append(Mat<float> q, const KvLayer& cache, Mat<const float> qkv, const RopeTable& rope,
                           int64_t kv_heads) = 0;

  // Softmax attention with one sink logit a head (in the denominator only), causal, over the last `window` keys.
  //                                                              out, q: [n, heads*64]   sinks: [heads]
  virtual void attention(Mat<float> out, Mat<const float> q, const KvLayer& cache, const float* sinks, int64_t kv_heads) = 0;

  // The k largest router logits (ties: the lower id) and their softmax, in float32. t: [n, H]   weight: [E, H] kTable   bias:
  // [E]
  virtual void route(Routing top, Mat<const float> t, const Weight& weight, const float* bias) = 0;

  // x += sum over the chosen experts of weight * down(swiglu(gate_up(t)))                        x, t: [n, H]
  virtual void moe_add(Mat<float> x, Mat<const float> t, const Routing& top, const ExpertWeights& experts) = 0;

  // --- fused: what a step does one after the other, in one operation ----------------------------------------------
  // The same bits as the narrow ones in sequence. A backend that gains nothing by fusing keeps these.

  // q and the cache from the residual stream: rmsnorm, linear, rope_append.            q: [n, heads*64]   x: [n, H]
  //                            weight: kRopePairs   t: [n, H] and qkv: [n, (heads + 2 kv_heads)*64], work space
  virtual void norm_qkv(Mat<float> q, const KvLayer& cache, Mat<const float> x, const Norm& norm, const Weight& weight,
                        const float* bias, const RopeTable& rope, int64_t kv_heads, Mat<float> t, Mat<float> qkv) {
    rmsnorm(t, x, norm.weight, norm.eps, nullptr);
    linear(qkv, {t.data, t.rows, t.cols}, weight, bias);
    rope_append(q, cache, {qkv.data, qkv.rows, qkv.cols}, rope, kv_heads);
  }

  // The routing of the normed rows, and the rows, which moe_add wants next: rmsnorm, route.                t, x: [n, H]
  virtual void norm_route(Routing top, Mat<float> t, Mat<const float> x, const Norm& norm, const Weight& weight,
                          const float* bias) {
    rmsnorm(t, x, norm.weight, norm.eps, nullptr);
    route(top, {t.data, t.rows, t.cols}, weight, bias);
  }

  // Sampling, in three parts, so that the middle one can be recorded: which rows tokens are wanted of (no row twice); the draw;
  // and the tokens, which are waited for: none behind a guess that was wrong. take_samples throws what Sampler::sample does,
  // and says whose row it was.
  //                                                                                         logits: [n, V], left unchanged
  virtual void ask_samples(const std::vector<SampleRequest>& requests) { asked_ = requests; }
  virtual void draw_samples(Mat<float>) {}
  virtual std::vector<std::optional<Sample>> take_samples(Mat<const float> logits);

  // Waits until everything asked for is done and results may be read.
  virtual void synchronize() = 0;

  // Bytes of a page in one of the two arrays of a KvLayer.
  int64_t page_bytes(int64_t kv_heads) const { return kv_heads * kPageTokens * kHeadDim * 2; }

 protected:
  virtual Sample take_sample(size_t i, Mat<const float> logits);  // of asked_[i], when all are there

  std::vector<SampleRequest> asked_;
};

Precision precision_of(const std::string& name);  // "exact" or "fast"; throws for any other name
const char* precision_name(Precision precision);

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options);
std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options);  // throws in a build without CUDA
bool cuda_available();                                                      // a build with CUDA, on a machine with a card

}  // namespace gptoss
