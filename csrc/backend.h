// What a backend does: memory, weights in its own arrangement, and a dozen coarse operations.
//
// The model (model.cpp) is written once against this interface. Choosing a kernel for one token or a thousand, grouping
// tokens by expert and rounding operands happen below it. Operations run in order on the backend's one stream; none
// allocates or waits for the host. Outputs come first, then inputs. Activations are float32; an operation that multiplies
// matrices rounds its activations to bfloat16 itself and sums in float32.
//
// The result of a row depends on its own sequence alone, bit for bit: not on other rows, not on how a prompt was cut into
// steps, not on the number of threads. One exception: products of many tokens on sm_90, unless BackendOptions::invariant.
#pragma once
#include <memory>
#include <string>

#include "batch.h"
#include "config.h"
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

struct BackendOptions {
  std::string device;            // "cpu", "cuda", "cuda:1"
  int threads = 0;               // 0: as many as this process may use
  std::string isa;               // CPU instruction set to force; empty: GPTOSS_ISA, else the best
  int64_t max_batch_tokens = 0;  // rows of the largest step
  bool invariant = false;        // a row's bits may not depend on the batch even where that costs speed (CUDA on sm_90)
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
  // Bytes this backend could still take for the cache.
  virtual size_t available_memory() const = 0;
  // Takes the work space of the operations for this shape, once.
  virtual void reserve(const ModelConfig& config) = 0;

  // --- weights ----------------------------------------------------------------------------------------------------
  virtual Weight make_weight(WeightFormat format, int64_t experts, int64_t rows, int64_t cols, bool gate_up) = 0;
  // rows [first_row, first_row + n) of a kTable or kBf16 weight.   source: bfloat16 [n, cols], host
  virtual void load_rows(Weight& weight, int64_t first_row, const HostTensor& source) = 0;
  // All codes, or all scales, of a kMxfp4 weight.    blocks: [E, rows, cols/32, 16], scales: [E, rows, cols/32] u8, host
  virtual void load_mxfp4_blocks(Weight& weight, const HostTensor& blocks) = 0;
  virtual void load_mxfp4_scales(Weight& weight, const HostTensor& scales) = 0;

  // --- one step ---------------------------------------------------------------------------------------------------
  // Stages the batch's integers; the operations below speak of its rows. The batch must outlive the step.
  virtual void begin(const Batch& batch) = 0;

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

  // Waits until everything asked for is done and results may be read.
  virtual void synchronize() = 0;

  // Bytes of a page in one of the two arrays of a KvLayer.
  int64_t page_bytes(int64_t kv_heads) const { return kv_heads * kPageTokens * kHeadDim * 2; }
};

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options);
std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options);  // throws in a build without CUDA
bool cuda_available();                                                      // a build with CUDA, on a machine with a card

}  // namespace gptoss
