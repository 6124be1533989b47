// The backend for a GPU: csrc/backend.h on one card. Everything goes onto one stream in order.
//   backend.cu     construction, memory, weights, work space
//   step.cu        a step: its batch, its graph, its samples
//   operations.cu  the operations of a step: which kernel, with what
//   device.cu      whether a card is there that it can run on
//
// The operations that feed a product (rmsnorm, attention) write their result rounded to bfloat16 besides, so that the product
// that follows reads it; a product of other rows rounds them first. Work space is taken by reserve(), and never in a step of a
// model; an operation outside of one takes more when it first needs it.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "cuda/failures.h"
#include "cuda/graphs.h"
#include "cuda/kernels.h"
#include "cuda/memory.h"

namespace gptoss::cuda {

class CudaBackend final : public Backend {
 public:
  CudaBackend(int device, const BackendOptions& options);
  ~CudaBackend() override;

  std::string device() const override { return join("cuda:", device_); }
  std::string isa() const override { return join("sm_", properties_.major, properties_.minor, " (", properties_.name, ")"); }
  int threads() const override { return properties_.multiProcessorCount; }

  // --- memory -----------------------------------------------------------------------------------------------------
  Buffer allocate(size_t bytes) override;
  void copy_in(void* device, const void* host, size_t bytes) override;
  void copy_out(void* host, const void* device, size_t bytes) override;
  size_t available_memory() const override;
  void synchronize() override;
  void reserve(const ModelConfig& config, const Limits& limits) override;
  size_t workspace_bytes(const ModelConfig& config, const Limits& limits) override;

  // --- weights ----------------------------------------------------------------------------------------------------
  size_t weight_bytes(WeightFormat format, int64_t experts, int64_t rows, int64_t cols) const override;
  Weight make_weight(WeightFormat format, int64_t experts, int64_t rows, int64_t cols, RowOrder order) override;
  void load_rows(Weight& weight, int64_t first_row, const HostTensor& source) override;
  void load_mxfp4_blocks(Weight& weight, const HostTensor& blocks) override;
  void load_mxfp4_scales(Weight& weight, const HostTensor& scales) override;
  void finish_loading() override;

  // --- one step ---------------------------------------------------------------------------------------------------
  void begin(const Batch& batch) override { stage_batch(batch, batch.n_tokens()); }
  void run(const Batch& batch, StepEnd end, const std::function<void(int64_t rows)>& operations) override;
  void embed(Mat<float> x, const Weight& table) override;
  void rmsnorm(Mat<float> t, Mat<const float> x, const float* weight, float eps, const int32_t* rows) override;
  void linear(Mat<float> out, Mat<const float> t, const Weight& weight, const float* bias) override {
    product(out, t, weight, bias, Epilogue::kStore);
  }
  void linear_add(Mat<float> x, Mat<const float> a, const Weight& weight, const float* bias) override {
    product(x, a, weight, bias, Epilogue::kAdd);
  }
  void rope_append(Mat<float> q, const KvLayer& cache, Mat<const float> qkv, const RopeTable& rope, int64_t kv_heads) override;
  void attention(Mat<float> out, Mat<const float> q, const KvLayer& cache, const float* sinks, int64_t kv_heads) override;
  void route(Routing top, Mat<const float> t, const Weight& weight, const float* bias) override;
  void moe_add(Mat<float> x, Mat<const float> t, const Routing& top, const ExpertWeights& experts) override;
  void ask_samples(const std::vector<SampleRequest>& requests) override;
  void draw_samples(Mat<float> logits) override;
  std::vector<std::optional<Sample>> take_samples(Mat<const float> logits) override;
  Sample take_sample(size_t i, Mat<const float> logits) override;
  void norm_qkv(Mat<float> q, const KvLayer& cache, Mat<const float> x, const Norm& norm, const Weight& weight,
                const float* bias, const RopeTable& rope, int64_t kv_heads, Mat<float> t, Mat<float> qkv) override;
  void norm_route(Routing top, Mat<float> t, Mat<const float> x, const Norm& norm, const Weight& weight,
                  const float* bias) override;

 private:
  static constexpr int64_t kMostAdjustments = 1 << 17;  // of logits, of all samples of a step; beyond, they are the host's work

  void use() const;

  // At least so many bytes. What was there may be in use until the stream has passed, and graphs have its address.
  void ensure(Buffer& buffer, int64_t bytes);

  Rounded rounded(int64_t rows, int64_t cols);
  // `data` is written anew: a rounded copy of it is out of date.
  void forget(const float* data) {
    if (data == rounded_of_) rounded_of_ = nullptr;
  }
  void remember(Mat<const float> t);
  Rounded rounded_input(Mat<const float> t);

  // n rows of x as hopper.cu wants them: row i is row slots[i] / gather of x, or row i where gather is 0.
  Rounded packed(Rounded x, const int32_t* slots, int32_t gather, int64_t n);
  // As a product of all rows in tiles of so many wants them.
  Rounded product_input(Mat<const float> t, int64_t tile);

  MatmulArgs matmul_args(const Weight& weight, const float* bias, int64_t n) const;
  RopeArgs rope_args(Mat<float> q, const KvLayer& cache, const RopeTable& rope, int64_t kv_heads) const;
  RouteArgs route_args(Routing top, Mat<const float> x, const Weight& weight, const float* bias);
  DispatchArgs dispatch_args(int64_t tile) const;
  // Tokens of a tile, which says what multiplies: kHopperTokens is hopper.cu. Of one matrix; and of the experts', where an
  // expert's slots on average count.
  int64_t row_tile(int64_t rows, int64_t cols) const;
  int64_t expert_tile(int64_t slots, int64_t experts) const;
  void multiply(const MatmulArgs& args, bool mxfp4, Epilogue epilogue, int64_t tile);
  void product(Mat<float> out, Mat<const float> t, const Weight& weight, const float* bias, Epilogue epilogue);
  int64_t pages_seen(int64_t window) const;
  void stage_batch(const Batch& batch, int64_t rows);
  void stage_masks(const std::vector<const uint32_t*>& masks, int64_t bytes);
  // Calls take(buffer, bytes) for all work space.
  template <class Take>
  void for_each_buffer(const ModelConfig& config, const Limits& limits, const Take& take);
  static int64_t batch_integers(const Limits& limits);
  void reserve_attention(int64_t rows, int64_t heads, int64_t kv_heads, int64_t context);
  template <class Arrange>
  void send_rows(const HostTensor& source, int64_t n, int64_t row_bytes, const Arrange& arrange);

  int device_;
  CardUse card_;
  int64_t max_tokens_;
  int64_t max_rows_;           // that a batch of single tokens is filled up to
  int64_t context_pages_ = 0;  // 0: not known
  bool hopper_ = false;        // products of many tokens are hopper.cu's
  bool replays_ = true;
  bool in_step_ = false;  // of a model: everything has been reserved
  cudaDeviceProp properties_{};
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Stage> stage_;                          // while loading
  std::unique_ptr<Event> batch_copied_, samples_copied_;  // what is pinned may be written again
  Buffer pinned_, integers_;                              // of the batch
  DeviceBatch batch_;
  int64_t longest_ = 0;  // positions of the batch's longest sequence

  Buffer rounded_;  // [n, cols] bfloat16
  const float* rounded_of_ = nullptr;
  int64_t rounded_rows_ = 0, rounded_cols_ = 0;
  Buffer packed_;                        // [n, cols] or [n k, H] bfloat16, for hopper.cu
  Buffer attention_space_;               // see attention_workspace_bytes
  Buffer slots_, tiles_, n_tiles_;       // [n k]; [tiles]; [1]
  const int32_t* dispatched_ = nullptr;  // the ids that they are sorted by, until the experts have run
  int64_t expert_cols_ = 0;              // the larger of H and I
  Buffer router_logits_;                 // [n, E]
  Buffer hidden_;                        // [n k, I] bfloat16
  Buffer outputs_;                       // [n k, H]
  Buffer counters_;                      // of blocks that have finished, all 0 between kernels
  // Sampling: number of rows and parameters; adjustments; masks; results; work space.
  Buffer sample_params_, sample_adjustments_, sample_masks_, sample_results_, sample_work_;
  Buffer sample_params_pinned_, sample_adjustments_pinned_, sample_masks_pinned_, sample_results_pinned_;
  int64_t max_logit_rows_ = 1;
  bool samples_on_host_ = false;  // more adjustments than there is room for
  GraphCache graphs_;
};

}  // namespace gptoss::cuda
