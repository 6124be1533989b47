// The operations on a GPU: checks, work space, and which kernel. Everything goes onto one stream in order.
//
// The operations that feed a product (rmsnorm, attention) write their result rounded to bfloat16 besides, so that the product
// that follows reads it; a product of other rows rounds them first. Work space is taken by reserve(), and never in a step of a
// model; an operation outside of one takes more when it first needs it.
//
// A batch of single tokens is filled up to one of a few sizes (bucket), and its step is replayed as a CUDA graph (graphs.h).
#include "backend.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cuda/failures.h"
#include "cuda/graphs.h"
#include "cuda/kernels.h"
#include "cuda/memory.h"

namespace gptoss::cuda {
namespace {

constexpr int kOldestMajor = 8;                // bf16 mma, cp.async
constexpr int64_t kMostAdjustments = 1 << 17;  // of logits, of all samples of a step; beyond, they are the host's work

int64_t next_power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// Rows that a batch of n single tokens is filled up to: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ...
int64_t bucket(int64_t n) {
  const int64_t size = next_power_of_two(n);
  return size >= 32 && n <= size * 3 / 4 ? size * 3 / 4 : size;
}

class CudaBackend final : public Backend {
 public:
  CudaBackend(int device, const BackendOptions& options)
      : device_(device), card_(device), max_tokens_(options.max_batch_tokens), max_rows_(max_tokens_) {
    CUDA_CHECK(cudaGetDeviceProperties(&properties_, device));
    hopper_ = properties_.major == 9 && !options.invariant;
    stream_ = std::make_unique<Stream>();
    batch_copied_ = std::make_unique<Event>();
    stage_ = std::make_unique<Stage>();
    const char* graphs = std::getenv("GPTOSS_CUDA_GRAPHS");
    replays_ = !graphs || std::string(graphs) != "0";
  }
  ~CudaBackend() override {
    if (cudaSetDevice(device_) == cudaSuccess) cudaStreamSynchronize(*stream_);
  }

  std::string device() const override { return join("cuda:", device_); }
  std::string isa() const override { return join("sm_", properties_.major, properties_.minor, " (", properties_.name, ")"); }
  int threads() const override { return properties_.multiProcessorCount; }

  // --- memory -----------------------------------------------------------------------------------------------------
  Buffer allocate(size_t bytes) override {
    use();
    rounded_of_ = nullptr;
    Buffer buffer = device_memory(bytes);
    if (bytes > 0) CUDA_CHECK(cudaMemsetAsync(buffer.data(), 0, bytes, *stream_));
    return buffer;
  }
  void copy_in(void* device, const void* host, size_t bytes) override {
    use();
    rounded_of_ = nullptr;
    dispatched_ = nullptr;
    CUDA_CHECK(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, *stream_));
    stream_->wait();  // the host's memory may go
  }
  void copy_out(void* host, const void* device, size_t bytes) override {
    use();
    CUDA_CHECK(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, *stream_));
    stream_->wait();
  }
  size_t available_memory() const override {
    use();
    size_t free = 0, total = 0;
    CUDA_CHECK(cudaMemGetInfo(&free, &total));
    const size_t spare = std::min<size_t>(512 << 20, total / 16);  // for kernels, graphs, and others
    return free > spare ? free - spare : 0;
  }
  void synchronize() override {
    use();
    stream_->wait();
  }
  void reserve(const ModelConfig& config, const Limits& limits) override;
  size_t workspace_bytes(const ModelConfig& config, const Limits& limits) override {
    size_t bytes = 0;
    for_each_buffer(config, limits, [&](Buffer&, int64_t n) { bytes += n; });
    return bytes;
  }

  // --- weights ----------------------------------------------------------------------------------------------------
  size_t weight_bytes(WeightFormat format, int64_t experts, int64_t rows, int64_t cols) const override {
    return format == WeightFormat::kTable ? rows * cols * 2
                                          : arranged_bytes(format == WeightFormat::kMxfp4, experts, rows, cols);
  }
  Weight make_weight(WeightFormat format, int64_t experts, int64_t rows, int64_t cols, RowOrder order) override;
  void load_rows(Weight& weight, int64_t first_row, const HostTensor& source) override;
  void load_mxfp4_blocks(Weight& weight, const HostTensor& blocks) override;
  void load_mxfp4_scales(Weight& weight, const HostTensor& scales) override;
  void finish_loading() override {
    synchronize();
    stage_ = std::make_unique<Stage>();
  }

  // --- one step ---------------------------------------------------------------------------------------------------
  void begin(const Batch& batch) override { stage_batch(batch, batch.n_tokens()); }
  void run(const Batch& batch, StepEnd end, const std::function<void(int64_t rows)>& operations) override;
  void embed(Mat<float> x, const Weight& table) override {
    use();
    forget(x.data);
    cuda::embed(x.data, batch_.tokens, table.storage.as<uint16_t>(), x.rows, x.cols, *stream_);
  }
  void rmsnorm(Mat<float> t, Mat<const float> x, const float* weight, float eps, const int32_t* rows) override;
  void linear(Mat<float> out, Mat<const float> t, const Weight& weight, const float* bias) override {
    product(out, t, weight, bias, Epilogue::kStore);
  }
  void linear_add(Mat<float> x, Mat<const float> a, const Weight& weight, const float* bias) override {
    product(x, a, weight, bias, Epilogue::kAdd);
  }
  void rope_append(Mat<float> q, const KvLayer& cache, Mat<const float> qkv, const RopeTable& rope, int64_t kv_heads) override {
    use();
    forget(q.data);
    cuda::rope_append(rope_args(q, cache, rope, kv_heads), qkv.data, q.rows, *stream_);
  }
  void attention(Mat<float> out, Mat<const float> q, const KvLayer& cache, const float* sinks, int64_t kv_heads) override;
  void route(Routing top, Mat<const float> t, const Weight& weight, const float* bias) override {
    use();
    cuda::route(route_args(top, t, weight, bias), *stream_);
  }
  void moe_add(Mat<float> x, Mat<const float> t, const Routing& top, const ExpertWeights& experts) override;
  void ask_samples(const std::vector<SampleRequest>& requests) override;
  void draw_samples(Mat<float> logits) override;
  std::vector<Sample> take_samples(Mat<const float> logits) override;
  void norm_qkv(Mat<float> q, const KvLayer& cache, Mat<const float> x, const Norm& norm, const Weight& weight,
                const float* bias, const RopeTable& rope, int64_t kv_heads, Mat<float> t, Mat<float> qkv) override;
  void norm_route(Routing top, Mat<float> t, Mat<const float> x, const Norm& norm, const Weight& weight,
                  const float* bias) override;

 private:
  void use() const {
    card_.check();
    int current = -1;
    CUDA_CHECK(cudaGetDevice(&current));
    if (current != device_) CUDA_CHECK(cudaSetDevice(device_));
  }

  // At least so many bytes. What was there may be in use until the stream has passed, and graphs have its address.
  void ensure(Buffer& buffer, int64_t bytes) {
    if (static_cast<int64_t>(buffer.bytes()) >= bytes) return;
    if (in_step_) FAIL("a step needs ", bytes, " bytes of work space where ", buffer.bytes(), " were reserved");
    stream_->wait();
    graphs_.clear();
    buffer = Buffer();
    buffer = device_memory(bytes);
  }

  Rounded rounded(int64_t rows, int64_t cols) {
    const int64_t stride = round_up(cols, 64);
    ensure(rounded_, rows * stride * 2);
    return {rounded_.as<uint16_t>(), stride};
  }
  // `data` is written anew: a rounded copy of it is out of date.
  void forget(const float* data) {
    if (data == rounded_of_) rounded_of_ = nullptr;
  }
  void remember(Mat<const float> t) {
    rounded_of_ = t.data;
    rounded_rows_ = t.rows;
    rounded_cols_ = t.cols;
  }
  Rounded rounded_input(Mat<const float> t) {
    const Rounded result = rounded(t.rows, t.cols);
    if (rounded_of_ == t.data && rounded_rows_ >= t.rows && rounded_cols_ == t.cols) return result;
    round_rows(result, t.data, t.rows, t.cols, *stream_);
    remember(t);
    return result;
  }

  // n rows of x as hopper.cu wants them: row i is row slots[i] / gather of x, or row i where gather is 0.
  Rounded packed(Rounded x, const int32_t* slots, int32_t gather, int64_t n) {
    ensure(packed_, n * x.stride * 2);
    const Rounded result = {packed_.as<uint16_t>(), x.stride};
    hopper_pack(result, x, slots, gather, batch_.n_rows, n, *stream_);
    return result;
  }
  // As a product of all rows in tiles of so many wants them.
  Rounded product_input(Mat<const float> t, int64_t tile) {
    const Rounded rows = rounded_input(t);
    return tile == kHopperTokens ? packed(rows, nullptr, 0, t.rows) : rows;
  }

  MatmulArgs matmul_args(const Weight& weight, const float* bias, int64_t n) const;
  RopeArgs rope_args(Mat<float> q, const KvLayer& cache, const RopeTable& rope, int64_t kv_heads) const;
  RouteArgs route_args(Routing top, Mat<const float> x, const Weight& weight, const float* bias);
  DispatchArgs dispatch_args(int64_t tile) const;
  // Tokens of a tile, which says what multiplies: kHopperTokens is hopper.cu. Of one matrix; and of the experts', where an
  // expert's slots on average count.
  int64_t row_tile(int64_t rows, int64_t cols) const {
    return hopper_ && hopper_pays(rows, 1) ? kHopperTokens : matmul_tile(rows, cols);
  }
  int64_t expert_tile(int64_t slots, int64_t experts) const {
    return hopper_ && hopper_pays(slots, experts) ? kHopperTokens : matmul_tile(ceil_div(slots, experts), expert_cols_);
  }
  void multiply(const MatmulArgs& args, bool mxfp4, Epilogue epilogue, int64_t tile) {
    if (tile == kHopperTokens)
      hopper_matmul(args, mxfp4, epilogue, properties_.multiProcessorCount, *stream_);
    else
      matmul(args, mxfp4, epilogue, tile, *stream_);
  }
  void product(Mat<float> out, Mat<const float> t, const Weight& weight, const float* bias, Epilogue epilogue);
  int64_t pages_seen(int64_t window) const;
  void stage_batch(const Batch& batch, int64_t rows);
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
  std::unique_ptr<Stage> stage_;         // while loading
  std::unique_ptr<Event> batch_copied_;  // the pinned integers may be written again
  Buffer pinned_, integers_;             // of the batch
  DeviceBatch batch_;
  int64_t longest_ = 0, most_new_ = 0;  // of the batch's sequences: positions, new tokens

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
  // Sampling: number of rows and parameters; adjustments; results; work space.
  Buffer sample_params_, sample_adjustments_, sample_results_, sample_work_;
  Buffer sample_params_pinned_, sample_adjustments_pinned_, sample_results_pinned_;
  int64_t max_logit_rows_ = 1;
  bool samples_on_host_ = false;  // more adjustments than there is room for
  GraphCache graphs_;
};

// ------------------------------------------------------------------------------------------------------------ weights

Weight CudaBackend::make_weight(WeightFormat format, int64_t experts, int64_t rows, int64_t cols, RowOrder order) {
  Weight weight{format, experts, rows, cols, order, {}};
  CHECK(cols % 32 == 0, "a weight of ", cols, " inputs: they must be a multiple of 32");
  CHECK(experts == 1 || rows % 16 == 0, "expert matrices of ", rows, " rows: they must be a multiple of 16");
  CHECK(order != RowOrder::kRopePairs || rows % kArrangedRows == 0, "heads of ", kArrangedRows, " rows, but ", rows, " rows");
  weight.storage = allocate(weight_bytes(format, experts, rows, cols));
  return weight;
}

// Sends n rows in parts of whole heads of 64: arrange(device, first row, rows).
template <class Arrange>
void CudaBackend::send_rows(const HostTensor& source, int64_t n, int64_t row_bytes, const Arrange& arrange) {
  use();
  const int64_t whole = static_cast<int64_t>(Stage::kBytes) / row_bytes / kArrangedRows * kArrangedRows;
  const int64_t step = std::max(kArrangedRows, whole);
  for (int64_t row = 0; row < n; row += step) {
    const int64_t now = std::min(step, n - row);
    const uint8_t* part = static_cast<const uint8_t*>(source.data) + row * row_bytes;
    if (source.on_device)
      arrange(part, row, now);
    else
      stage_->send(part, now * row_bytes, *stream_, [&](const void* device) { arrange(device, row, now); });
  }
}

void CudaBackend::load_rows(Weight& weight, int64_t first_row, const HostTensor& source) {
  const int64_t cols = weight.cols;
  const bool table = weight.format == WeightFormat::kTable;
  const int64_t block = weight.order == RowOrder::kRopePairs ? kArrangedRows : 16;
  CHECK(table || first_row % block == 0, source.name, ": its rows start at ", first_row, ", inside a block of ", block);
  uint8_t* storage = weight.storage.as<uint8_t>();
  send_rows(source, source.shape[0], cols * 2, [&](const void* device, int64_t row, int64_t n) {
    if (table)
      CUDA_CHECK(
          cudaMemcpyAsync(storage + (first_row + row) * cols * 2, device, n * cols * 2, cudaMemcpyDeviceToDevice, *stream_));
    else
      arrange_bf16(storage, static_cast<const uint16_t*>(device), first_row + row, n, cols, weight.order, *stream_);
  });
}

void CudaBackend::load_mxfp4_blocks(Weight& weight, const HostTensor& blocks) {
  send_rows(blocks, weight.experts * weight.rows, weight.cols / 2, [&](const void* device, int64_t row, int64_t n) {
    arrange_mxfp4(weight.storage.as<uint8_t>(), static_cast<const uint8_t*>(device), row, n, weight.cols, weight.order,
                  *stream_);
  });
}

void CudaBackend::load_mxfp4_scales(Weight& weight, const HostTensor& scales) {
  uint8_t* storage = weight.storage.as<uint8_t>() + arranged_scales_offset(weight.experts, weight.rows, weight.cols);
  send_rows(scales, weight.experts * weight.rows, weight.cols / 32, [&](const void* device, int64_t row, int64_t n) {
    arrange_scales(storage, static_cast<const uint8_t*>(device), row, n, weight.cols, weight.order, *stream_);
  });
}

template <class Take>
void CudaBackend::for_each_buffer(const ModelConfig& config, const Limits& limits, const Take& take) {
  const int64_t n = limits.batch_tokens, slots = n * config.experts_per_token;
  take(integers_, batch_integers(limits) * 4);
  take(rounded_, n * round_up(std::max(config.hidden_size, config.q_size()), 64) * 2);
  if (hopper_) take(packed_, 2 * std::max(slots * round_up(config.hidden_size, 64), n * round_up(config.q_size(), 64)));
  take(slots_, slots * 4);
  take(tiles_, max_tiles(slots, config.n_experts, kNarrowTile) * static_cast<int64_t>(sizeof(TokenTile)));
  take(n_tiles_, 4);
  take(router_logits_, n * config.n_experts * 4);
  take(hidden_, slots * round_up(config.intermediate_size, 64) * 2);
  take(outputs_, slots * config.hidden_size * 4);
  // Narrow tiles are for tokens of which experts meet no more than one tile each on average.
  const int64_t few = std::min(n, kNarrowTile * config.n_experts / config.experts_per_token), H = config.hidden_size;
  take(counters_, 4 * std::max({n + 1, combine_counters(few, H, kNarrowTile), combine_counters(n, H, kWideTile)}));
  const int64_t logit_rows = limits.logit_rows();
  take(sample_params_, 16 + logit_rows * static_cast<int64_t>(sizeof(SampleParams)));
  take(sample_adjustments_, kMostAdjustments * static_cast<int64_t>(sizeof(StagedAdjustment)));
  take(sample_results_, logit_rows * static_cast<int64_t>(sizeof(SampleResult)));
  take(sample_work_, sample_workspace_bytes(logit_rows, config.vocab_size));
  take(attention_space_, attention_workspace_bytes(n, config.n_heads, config.n_kv_heads, limits.context));
}

void CudaBackend::reserve(const ModelConfig& config, const Limits& limits) {
  use();
  max_rows_ = std::min(limits.batch_tokens, limits.sequences);
  max_logit_rows_ = limits.logit_rows();
  context_pages_ = ceil_div(limits.context, kPageTokens);
  expert_cols_ = std::max(config.hidden_size, config.intermediate_size);
  for_each_buffer(config, limits, [this](Buffer& buffer, int64_t bytes) { ensure(buffer, bytes); });
  pinned_ = pinned_memory(integers_.bytes());
  sample_params_pinned_ = pinned_memory(sample_params_.bytes());
  sample_adjustments_pinned_ = pinned_memory(sample_adjustments_.bytes());
  sample_results_pinned_ = pinned_memory(sample_results_.bytes());
  CUDA_CHECK(cudaMemsetAsync(hidden_.data(), 0, hidden_.bytes(), *stream_));  // columns past the end stay 0
  CUDA_CHECK(cudaMemsetAsync(counters_.data(), 0, counters_.bytes(), *stream_));
  CUDA_CHECK(cudaMemsetAsync(attention_space_.data(), 0, attention_space_.bytes(), *stream_));
}

// ------------------------------------------------------------------------------------------------------------ a step

// How attention takes the rows: those of a sequence with many new ones in blocks (first row, rows), the others one by one. A
// batch of single tokens has no lists: all its rows are taken one by one.
struct CutRows {
  std::vector<int32_t> row_blocks, single_rows;
};
CutRows cut_rows(const Batch& batch) {
  CutRows cut;
  if (batch.is_decode()) return cut;
  for (const BatchSequence& s : batch.sequences) {
    const int64_t step = s.n_rows > kFewRows ? kRowBlock : 1;
    for (int64_t i = 0; i < s.n_rows; i += step) {
      std::vector<int32_t>& to = step == 1 ? cut.single_rows : cut.row_blocks;
      to.push_back(static_cast<int32_t>(s.first_row + i));
      if (step > 1) to.push_back(static_cast<int32_t>(std::min(step, s.n_rows - i)));
    }
  }
  return cut;
}

// The most that stage_batch writes.
int64_t CudaBackend::batch_integers(const Limits& limits) {
  const int64_t pages = ceil_div(limits.context, kPageTokens);
  return 2 + 5 * limits.batch_tokens + 2 * limits.sequences + 2 * limits.sequences * pages;
}

// The batch's integers in one buffer and one copy, each at a place that depends on `rows` alone where the batch is one of
// single tokens. Rows past the batch's own are token 0 at position 0 of sequences whose one page is the scratch page.
void CudaBackend::stage_batch(const Batch& batch, int64_t rows) {
  use();
  rounded_of_ = nullptr;
  dispatched_ = nullptr;
  const int64_t n = batch.n_tokens(), padding = rows - n, sequences = static_cast<int64_t>(batch.sequences.size()) + padding;
  CHECK(rows <= max_tokens_, "a step takes at most ", max_tokens_, " tokens, not ", n);
  const CutRows cut = cut_rows(batch);
  int64_t count = 2 + 3 * rows + 2 * sequences + std::ssize(cut.row_blocks) + std::ssize(cut.single_rows);
  for (const BatchSequence& s : batch.sequences)
    count += static_cast<int64_t>(s.full_pages->pages.size() + s.window_pages->pages.size());
  batch_copied_->wait();
  ensure(integers_, count * 4);
  if (pinned_.bytes() < integers_.bytes()) pinned_ = pinned_memory(integers_.bytes());

  int32_t* next = pinned_.as<int32_t>();
  const auto put = [&](const std::vector<int32_t>& values, int64_t zeros = 0) {
    const int32_t* place = integers_.as<int32_t>() + (next - pinned_.as<int32_t>());
    next = std::fill_n(std::copy(values.begin(), values.end(), next), zeros, 0);
    return place;
  };
  std::vector<int32_t> sequence_of = batch.sequence_of, full_base, window_base, pages = {kScratchPage};
  for (int64_t row = n; row < rows; ++row) sequence_of.push_back(static_cast<int32_t>(row));
  longest_ = most_new_ = 0;
  const auto add = [&](std::vector<int32_t>& base, const PageList& list) {
    base.push_back(static_cast<int32_t>(static_cast<int64_t>(pages.size()) - list.first_page));
    pages.insert(pages.end(), list.pages.begin(), list.pages.end());
  };
  for (const BatchSequence& s : batch.sequences) {
    add(full_base, *s.full_pages);
    add(window_base, *s.window_pages);
    longest_ = std::max(longest_, s.position + s.n_rows);
    most_new_ = std::max(most_new_, s.n_rows);
  }
  batch_.n_rows = put({static_cast<int32_t>(n)});
  batch_.tokens = put(batch.tokens, padding);
  batch_.positions = put(batch.positions, padding);
  batch_.sequence_of = put(sequence_of);
  batch_.full_base = put(full_base, padding);
  batch_.window_base = put(window_base, padding);
  batch_.pages = put(pages);
  batch_.row_blocks = reinterpret_cast<const RowBlock*>(put(cut.row_blocks));
  batch_.single_rows = batch.is_decode() ? nullptr : put(cut.single_rows);
  batch_.n_row_blocks = std::ssize(cut.row_blocks) / 2;
  batch_.n_single_rows = batch.is_decode() ? rows : std::ssize(cut.single_rows);
  CUDA_CHECK(cudaMemcpyAsync(integers_.data(), pinned_.data(), count * 4, cudaMemcpyHostToDevice, *stream_));
  batch_copied_->record(*stream_);
}

void CudaBackend::run(const Batch& batch, StepEnd end, const std::function<void(int64_t rows)>& operations) {
  const bool single = batch.is_decode();
  const int64_t rows = single ? std::min(bucket(batch.n_tokens()), max_rows_) : batch.n_tokens();
  in_step_ = true;
  try {
    stage_batch(batch, rows);
    if (single && replays_)
      graphs_.run({rows, pages_seen(0), end}, *stream_, [&] { operations(rows); });
    else
      operations(rows);
  } catch (...) {
    in_step_ = false;
    throw;
  }
  in_step_ = false;
  rounded_of_ = nullptr;  // a replay leaves no note of what was rounded
}

void CudaBackend::rmsnorm(Mat<float> t, Mat<const float> x, const float* weight, float eps, const int32_t* rows) {
  use();
  const Rounded result = rounded(t.rows, t.cols);
  for (int64_t first = 0; first < t.rows; first += rows ? RowList::kMax : t.rows) {
    const int64_t n = rows ? std::min<int64_t>(RowList::kMax, t.rows - first) : t.rows;
    RowList list{};
    if (rows) std::copy_n(rows + first, n, list.rows);
    cuda::rmsnorm(t.row(first), {result.data + first * result.stride, result.stride}, x.data, weight, eps, n, t.cols,
                  rows ? &list : nullptr, *stream_);
  }
  remember({t.data, t.rows, t.cols});
}

MatmulArgs CudaBackend::matmul_args(const Weight& weight, const float* bias, int64_t n) const {
  MatmulArgs args;
  args.codes = weight.storage.as<uint8_t>();
  args.scales = args.codes + arranged_scales_offset(weight.experts, weight.rows, weight.cols);
  args.rows = weight.rows;
  args.cols = weight.cols;
  args.order = weight.order;
  args.n = n;
  args.bias = bias;
  return args;
}

void CudaBackend::product(Mat<float> out, Mat<const float> t, const Weight& weight, const float* bias, Epilogue epilogue) {
  use();
  MatmulArgs args = matmul_args(weight, bias, t.rows);
  args.out = out.data;
  const int64_t tile = row_tile(t.rows, t.cols);
  args.x = product_input(t, tile);
  multiply(args, weight.format == WeightFormat::kMxfp4, epilogue, tile);
  forget(out.data);
}

RopeArgs CudaBackend::rope_args(Mat<float> q, const KvLayer& cache, const RopeTable& rope, int64_t kv_heads) const {
  RopeArgs args;
  args.q = q.data;
  args.keys = static_cast<uint16_t*>(cache.keys);
  args.values = static_cast<uint16_t*>(cache.values);
  args.cos = rope.cos.data;
  args.sin = rope.sin.data;
  args.batch = batch_;
  args.window = cache.window > 0;
  args.heads = static_cast<int32_t>(q.cols / kHeadDim);
  args.kv_heads = static_cast<int32_t>(kv_heads);
  return args;
}

// Few rows are normed by every block of the product; more, once before it.
void CudaBackend::norm_qkv(Mat<float> q, const KvLayer& cache, Mat<const float> x, const Norm& norm, const Weight& weight,
                           const float* bias, const RopeTable& rope, int64_t kv_heads, Mat<float> t, Mat<float>) {
  use();
  CHECK(weight.order == RowOrder::kRopePairs, "norm_qkv takes a weight whose rows are ordered for the rotation");
  MatmulArgs args = matmul_args(weight, bias, x.rows);
  args.rope = rope_args(q, cache, rope, kv_heads);
  const int64_t tile = row_tile(x.rows, x.cols);
  if (tile != kNarrowTile) {
    rmsnorm(t, x, norm.weight, norm.eps, nullptr);
    args.x = product_input({t.data, t.rows, t.cols}, tile);
  }
  args.residual = x.data;
  args.norm_weight = norm.weight;
  args.eps = norm.eps;
  multiply(args, false, Epilogue::kRope, tile);
  forget(q.data);
}

// Pages that one row of the batch can see, at most: of a window, a constant; of all, rounded up to a power of two, so that
// few launches differ.
int64_t CudaBackend::pages_seen(int64_t window) const {
  const int64_t now = ceil_div(longest_, kPageTokens);
  const int64_t all = window ? ceil_div(window - 1, kPageTokens) + 1 : next_power_of_two(now);
  return std::min(all, std::max(now, context_pages_));
}

void CudaBackend::reserve_attention(int64_t rows, int64_t heads, int64_t kv_heads, int64_t context) {
  const int64_t bytes = attention_workspace_bytes(rows, heads, kv_heads, context);
  if (static_cast<int64_t>(attention_space_.bytes()) >= bytes) return;
  ensure(attention_space_, bytes);
  CUDA_CHECK(cudaMemsetAsync(attention_space_.data(), 0, bytes, *stream_));
}

void CudaBackend::attention(Mat<float> out, Mat<const float> q, const KvLayer& cache, const float* sinks, int64_t kv_heads) {
  use();
  AttentionArgs args;
  args.out = out.data;
  args.rounded = rounded(out.rows, out.cols);
  args.q = q.data;
  args.keys = static_cast<const uint16_t*>(cache.keys);
  args.values = static_cast<const uint16_t*>(cache.values);
  args.sinks = sinks;
  args.batch = batch_;
  args.heads = q.cols / kHeadDim;
  args.kv_heads = kv_heads;
  args.window = cache.window;
  args.max_pages = pages_seen(cache.window);
  args.multiprocessors = properties_.multiProcessorCount;
  reserve_attention(batch_.n_single_rows, args.heads, kv_heads, args.max_pages * kPageTokens);
  args.workspace = attention_space_.data();
  args.workspace_bytes = static_cast<int64_t>(attention_space_.bytes());
  cuda::attention(args, *stream_);
  remember({out.data, out.rows, out.cols});
}

RouteArgs CudaBackend::route_args(Routing top, Mat<const float> x, const Weight& weight, const float* bias) {
  dispatched_ = nullptr;
  RouteArgs args;
  args.ids = top.experts.data;
  args.weights = top.weights.data;
  args.x = x.data;
  args.router = weight.storage.as<uint16_t>();
  args.bias = bias;
  args.n = x.rows;
  args.hidden = x.cols;
  args.experts = weight.rows;
  args.k = top.experts.cols;
  args.n_rows = batch_.n_rows;
  args.logits = router_logits_.as<float>();
  args.counters = counters_.as<unsigned>();
  return args;
}

DispatchArgs CudaBackend::dispatch_args(int64_t tile) const {
  return {slots_.as<int32_t>(), tiles_.as<TokenTile>(), n_tiles_.as<int32_t>(), static_cast<int32_t>(tile)};
}

void CudaBackend::norm_route(Routing top, Mat<float> t, Mat<const float> x, const Norm& norm, const Weight& weight,
                             const float* bias) {
  use();
  RouteArgs args = route_args(top, x, weight, bias);
  args.norm_weight = norm.weight;
  args.eps = norm.eps;
  args.t = t.data;
  args.rounded = rounded(t.rows, t.cols);
  const int64_t slots = top.experts.size();
  if (routes_and_dispatches(slots)) {
    args.dispatch = dispatch_args(expert_tile(slots, weight.rows));
    dispatched_ = top.experts.data;
  }
  cuda::route(args, *stream_);
  remember({t.data, t.rows, t.cols});
}

void CudaBackend::moe_add(Mat<float> x, Mat<const float> t, const Routing& top, const ExpertWeights& experts) {
  use();
  const Weight &gate_up = *experts.gate_up, &down = *experts.down;
  const int64_t k = top.experts.cols, slots = t.rows * k, n_experts = gate_up.experts;
  const int64_t tile = expert_tile(slots, n_experts);
  const DispatchArgs sorted = dispatch_args(tile);
  const Rounded rows = rounded_input(t), hidden = {hidden_.as<uint16_t>(), round_up(down.cols, 64)};
  if (dispatched_ != top.experts.data) dispatch(sorted, top.experts.data, slots, n_experts, *stream_);
  dispatched_ = nullptr;
  const auto grouped = [&](const Weight& weight, const float* bias) {
    MatmulArgs args = matmul_args(weight, bias, t.rows);
    args.tiles = sorted.tiles;
    args.n_tiles = sorted.n_tiles;
    args.max_tiles = max_tiles(slots, n_experts, tile);
    args.slots = sorted.slots;
    args.choices = static_cast<int32_t>(k);
    args.n_rows = batch_.n_rows;
    return args;
  };
  MatmulArgs up = grouped(gate_up, experts.gate_up_bias);
  up.x = tile == kHopperTokens ? packed(rows, sorted.slots, up.choices, slots) : rows;
  up.gather = true;
  up.hidden = hidden;
  up.limit = experts.swiglu_limit;
  multiply(up, true, Epilogue::kSwiglu, tile);

  MatmulArgs last = grouped(down, experts.down_bias);
  last.x = hidden;
  last.out = x.data;
  last.parts = outputs_.as<float>();
  last.shares = top.weights.data;
  last.counters = counters_.as<unsigned>();
  multiply(last, true, Epilogue::kCombine, tile);
  forget(x.data);
}

// Staged: how many rows, their parameters, and at a fixed place the adjustments of all. Launches depend on the rows of the
// logits alone.
void CudaBackend::ask_samples(const std::vector<SampleRequest>& requests) {
  use();
  asked_ = requests;
  std::vector<SampleParams> params;
  std::vector<StagedAdjustment> adjustments;
  for (const SampleRequest& request : requests)
    params.push_back(stage_sample(adjustments, *request.sampler, request.row, request.position));
  samples_on_host_ = std::ssize(adjustments) > kMostAdjustments;
  if (samples_on_host_) {
    params.clear();
    adjustments.clear();
  }
  const int64_t rows = std::max<int64_t>(std::ssize(params), max_logit_rows_);
  ensure(sample_params_, 16 + rows * static_cast<int64_t>(sizeof(SampleParams)));
  ensure(sample_adjustments_, kMostAdjustments * static_cast<int64_t>(sizeof(StagedAdjustment)));
  const auto send = [this](Buffer& pinned, const Buffer& device, const void* head, size_t head_bytes, const void* rest,
                           size_t rest_bytes) {
    if (pinned.bytes() < device.bytes()) pinned = pinned_memory(device.bytes());
    std::memcpy(pinned.data(), head, head_bytes);
    std::memcpy(pinned.as<uint8_t>() + head_bytes, rest, rest_bytes);
    CUDA_CHECK(cudaMemcpyAsync(device.data(), pinned.data(), head_bytes + rest_bytes, cudaMemcpyHostToDevice, *stream_));
  };
  const int32_t head[4] = {static_cast<int32_t>(params.size())};
  send(sample_params_pinned_, sample_params_, head, sizeof head, params.data(), params.size() * sizeof(SampleParams));
  if (!adjustments.empty())
    send(sample_adjustments_pinned_, sample_adjustments_, nullptr, 0, adjustments.data(),
         adjustments.size() * sizeof(StagedAdjustment));
}

void CudaBackend::draw_samples(Mat<float> logits) {
  use();
  const int64_t n = logits.rows, bytes = n * static_cast<int64_t>(sizeof(SampleResult));
  ensure(sample_results_, bytes);
  ensure(sample_work_, sample_workspace_bytes(n, logits.cols));
  if (sample_results_pinned_.bytes() < sample_results_.bytes()) sample_results_pinned_ = pinned_memory(sample_results_.bytes());
  const uint8_t* staged = sample_params_.as<uint8_t>();
  cuda::sample(sample_results_.as<SampleResult>(), logits.data, reinterpret_cast<const SampleParams*>(staged + 16),
               sample_adjustments_.as<StagedAdjustment>(), sample_work_.data(), reinterpret_cast<const int32_t*>(staged), n,
               logits.cols, *stream_);
  CUDA_CHECK(cudaMemcpyAsync(sample_results_pinned_.data(), sample_results_.data(), bytes, cudaMemcpyDeviceToHost, *stream_));
}

std::vector<Sample> CudaBackend::take_samples(Mat<const float> logits) {
  use();
  stream_->wait();
  if (samples_on_host_) return Backend::take_samples(logits);
  std::vector<Sample> samples;
  std::vector<float> row(logits.cols);
  for (size_t i = 0; i < asked_.size(); ++i) {
    const SampleRequest& request = asked_[i];
    if (request.sampler->options().logprobs > kTopLogprobs) {
      copy_out(row.data(), logits.row(request.row), row.size() * sizeof(float));
      samples.push_back(request.sampler->sample(row.data(), request.position));
    } else {
      samples.push_back(finish_sample(sample_results_pinned_.as<SampleResult>()[i], *request.sampler));
    }
  }
  return samples;
}

int device_index(const std::string& device) {
  if (device == "cuda") return 0;
  const std::string digits = device.rfind("cuda:", 0) == 0 ? device.substr(5) : "";
  CHECK(!digits.empty() && digits.size() < 5 && digits.find_first_not_of("0123456789") == std::string::npos,
        "device must be \"cuda\" or \"cuda:N\", not \"", device, "\"");
  return std::stoi(digits);
}

// Throws unless the card is there and this build has kernels for it.
void check_device(const std::string& name, int device) {
  int n = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&n); status != cudaSuccess || n == 0) {
    cudaGetLastError();
    FAIL("device \"", name, "\" was asked for, but this machine has no usable GPU (",
         status == cudaSuccess ? "none found" : cudaGetErrorString(status), "); use device=\"cpu\"");
  }
  CHECK(device < n, "device \"", name, "\" was asked for, but this machine has ", n, n == 1 ? " GPU" : " GPUs");
  cudaDeviceProp properties{};
  CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  const int major = properties.major, minor = properties.minor;
  const auto refuse = [&](const std::string& why) {
    FAIL("device \"", name, "\" is a ", properties.name, " of compute capability ", major, ".", minor, ", but ", why,
         "; use device=\"cpu\"");
  };
  if (major < kOldestMajor) refuse(join("gptoss needs ", kOldestMajor, ".0 or newer"));
  const std::vector<int> built = {__CUDA_ARCH_LIST__};  // 800, 900, ...: binaries run on cards of the same major number
  if (std::none_of(built.begin(), built.end(), [&](int arch) { return arch / 100 == major && arch % 100 / 10 <= minor; }))
    refuse(join("this build has kernels for ", built, " only (times 100)"));
}

}  // namespace
}  // namespace gptoss::cuda

namespace gptoss {

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options) {
  const int device = cuda::device_index(options.device);
  cuda::CardUse::revive(device);
  cuda::check_device(options.device, device);
  return std::make_unique<cuda::CudaBackend>(device, options);
}

bool cuda_available() {
  try {
    cuda::check_device("cuda", 0);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace gptoss
