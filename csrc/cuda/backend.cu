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
#include <memory>

#include "cuda/failures.h"
#include "cuda/graphs.h"
#include "cuda/kernels.h"
#include "cuda/memory.h"

namespace gptoss::cuda {
namespace {

constexpr int kOldestMajor = 8;  // bf16 mma, cp.async

// Where the parameters of sampled rows begin, after their number; and room for adjustments of tokens. Longer lists take more.
constexpr int64_t kAtSampleParams = 16, kAdjustmentBytes = 256 << 10;

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
  Weight make_weight(WeightFormat format, int64_t experts, int64_t rows, int64_t cols, bool gate_up) override;
  void load_rows(Weight& weight, int64_t first_row, const HostTensor& source) override;
  void load_mxfp4_blocks(Weight& weight, const HostTensor& blocks) override;
  void load_mxfp4_scales(Weight& weight, const HostTensor& scales) override;
  void finish_loading() override {
    synchronize();
    stage_ = std::make_unique<Stage>();
  }

  // --- one step ---------------------------------------------------------------------------------------------------
  void begin(const Batch& batch) override { stage_batch(batch, batch.n_tokens()); }
  void run(const Batch& batch, bool reads_out, const std::function<void(int64_t rows)>& operations) override;
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
    cuda::rope_append(q.data, static_cast<uint16_t*>(cache.keys), static_cast<uint16_t*>(cache.values), qkv.data, rope.cos.data,
                      rope.sin.data, batch_, cache.window > 0, q.rows, q.cols / kHeadDim, kv_heads, *stream_);
  }
  void attention(Mat<float> out, Mat<const float> q, const KvLayer& cache, const float* sinks, int64_t kv_heads) override;
  void route(Routing top, Mat<const float> t, const Weight& weight, const float* bias) override {
    use();
    cuda::route(top.experts.data, top.weights.data, t.data, weight.storage.as<uint16_t>(), bias, t.rows, t.cols, weight.rows,
                top.experts.cols, *stream_);
  }
  void moe_add(Mat<float> x, Mat<const float> t, const Routing& top, const ExpertWeights& experts) override;
  std::vector<Sample> sample(Mat<float> logits, const std::vector<SampleRow>& rows) override;

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

  void product(Mat<float> out, Mat<const float> t, const Weight& weight, const float* bias, Epilogue epilogue);
  int64_t pages_seen(int64_t window) const;
  void stage_batch(const Batch& batch, int64_t rows);
  // Calls take(buffer, bytes) for all work space.
  template <class Take>
  void for_each_buffer(const ModelConfig& config, const Limits& limits, const Take& take);
  static int64_t batch_integers(const Limits& limits);
  template <class Arrange>
  void send_rows(const HostTensor& source, int64_t n, int64_t row_bytes, const Arrange& arrange);

  int device_;
  CardUse card_;
  int64_t max_tokens_;
  int64_t max_rows_;           // that a batch of single tokens is filled up to
  int64_t context_pages_ = 0;  // 0: not known
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
  Buffer partial_;                  // attention's parts
  Buffer slots_, tiles_, n_tiles_;  // [n k]; [tiles]; [1]
  Buffer hidden_;                   // [n k, I] bfloat16
  Buffer outputs_;                  // [n k, H]

  Buffer sample_pinned_, sample_staged_;  // number of rows, parameters, adjustments
  Buffer sample_results_, sample_results_host_;
  Buffer sample_work_;
  GraphCache graphs_;
};

// ------------------------------------------------------------------------------------------------------------ weights

Weight CudaBackend::make_weight(WeightFormat format, int64_t experts, int64_t rows, int64_t cols, bool gate_up) {
  Weight weight{format, experts, rows, cols, gate_up, {}};
  CHECK(cols % 32 == 0, "a weight of ", cols, " inputs: they must be a multiple of 32");
  CHECK(experts == 1 || rows % 16 == 0, "expert matrices of ", rows, " rows: they must be a multiple of 16");
  weight.storage = allocate(weight_bytes(format, experts, rows, cols));
  return weight;
}

// Sends n rows in parts of whole blocks of 16: arrange(device, first row, rows).
template <class Arrange>
void CudaBackend::send_rows(const HostTensor& source, int64_t n, int64_t row_bytes, const Arrange& arrange) {
  use();
  const int64_t step = std::max<int64_t>(16, static_cast<int64_t>(Stage::kBytes) / row_bytes / 16 * 16);
  for (int64_t row = 0; row < n; row += step) {
    const int64_t now = std::min(step, n - row);
    stage_->send(static_cast<const uint8_t*>(source.data) + row * row_bytes, now * row_bytes, *stream_,
                 [&](void* device) { arrange(device, row, now); });
  }
}

void CudaBackend::load_rows(Weight& weight, int64_t first_row, const HostTensor& source) {
  const int64_t cols = weight.cols;
  const bool table = weight.format == WeightFormat::kTable;
  CHECK(table || first_row % 16 == 0, source.name, ": its rows start at ", first_row, ", inside a block of 16");
  uint8_t* storage = weight.storage.as<uint8_t>();
  send_rows(source, source.shape[0], cols * 2, [&](void* device, int64_t row, int64_t n) {
    if (table)
      CUDA_CHECK(
          cudaMemcpyAsync(storage + (first_row + row) * cols * 2, device, n * cols * 2, cudaMemcpyDeviceToDevice, *stream_));
    else
      arrange_bf16(storage, static_cast<const uint16_t*>(device), first_row + row, n, cols, *stream_);
  });
}

void CudaBackend::load_mxfp4_blocks(Weight& weight, const HostTensor& blocks) {
  send_rows(blocks, weight.experts * weight.rows, weight.cols / 2, [&](void* device, int64_t row, int64_t n) {
    arrange_mxfp4(weight.storage.as<uint8_t>(), static_cast<const uint8_t*>(device), row, n, weight.cols, weight.gate_up,
                  *stream_);
  });
}

void CudaBackend::load_mxfp4_scales(Weight& weight, const HostTensor& scales) {
  uint8_t* storage = weight.storage.as<uint8_t>() + arranged_scales_offset(weight.experts, weight.rows, weight.cols);
  send_rows(scales, weight.experts * weight.rows, weight.cols / 32, [&](void* device, int64_t row, int64_t n) {
    arrange_scales(storage, static_cast<const uint8_t*>(device), row, n, weight.cols, weight.gate_up, *stream_);
  });
}

template <class Take>
void CudaBackend::for_each_buffer(const ModelConfig& config, const Limits& limits, const Take& take) {
  const int64_t n = limits.batch_tokens, slots = n * config.experts_per_token;
  take(integers_, batch_integers(limits) * 4);
  take(rounded_, n * round_up(std::max(config.hidden_size, config.q_size()), 64) * 2);
  take(slots_, slots * 4);
  take(tiles_, (slots / 8 + std::min(slots, config.n_experts) + 1) * static_cast<int64_t>(sizeof(TokenTile)));
  take(n_tiles_, 4);
  take(hidden_, slots * round_up(config.intermediate_size, 64) * 2);
  take(outputs_, slots * config.hidden_size * 4);
  const int64_t sampled = std::bit_ceil<uint64_t>(std::min(n, limits.sequences));
  take(sample_staged_, kAtSampleParams + sampled * static_cast<int64_t>(sizeof(SampleParams)) + kAdjustmentBytes);
  take(sample_results_, sampled * static_cast<int64_t>(sizeof(SampleResult)));
  take(sample_work_, sample_workspace_bytes(sampled, config.vocab_size));
  int64_t partial = 0;
  AttentionArgs args;
  args.heads = config.n_heads;
  args.kv_heads = config.n_kv_heads;
  for (args.n = 1; args.n <= n && args.heads > 0; ++args.n)
    for (int64_t pages = 1; pages < 2 * ceil_div(limits.context, kPageTokens); pages *= 2) {
      args.max_pages = std::min(pages, ceil_div(limits.context, kPageTokens));
      partial = std::max(partial, attention_partial_bytes(args));
    }
  take(partial_, partial);
}

void CudaBackend::reserve(const ModelConfig& config, const Limits& limits) {
  use();
  max_rows_ = std::min(limits.batch_tokens, limits.sequences);
  context_pages_ = ceil_div(limits.context, kPageTokens);
  for_each_buffer(config, limits, [this](Buffer& buffer, int64_t bytes) { ensure(buffer, bytes); });
  pinned_ = pinned_memory(integers_.bytes());
  sample_pinned_ = pinned_memory(sample_staged_.bytes());
  sample_results_host_ = pinned_memory(sample_results_.bytes());
  CUDA_CHECK(cudaMemsetAsync(hidden_.data(), 0, hidden_.bytes(), *stream_));  // columns past the end stay 0
}

// ------------------------------------------------------------------------------------------------------------ a step

// The most that stage_batch writes.
int64_t CudaBackend::batch_integers(const Limits& limits) {
  const int64_t pages = ceil_div(limits.context, kPageTokens);
  return 2 + 3 * limits.batch_tokens + 2 * limits.sequences + 2 * limits.sequences * pages;
}

// The batch's integers in one buffer and one copy, each at a place that depends on `rows` alone where the batch is one of
// single tokens. Rows past the batch's own are token 0 at position 0 of sequences whose one page is the scratch page.
void CudaBackend::stage_batch(const Batch& batch, int64_t rows) {
  use();
  rounded_of_ = nullptr;
  const int64_t n = batch.n_tokens(), padding = rows - n, sequences = static_cast<int64_t>(batch.sequences.size()) + padding;
  CHECK(rows <= max_tokens_, "a step takes at most ", max_tokens_, " tokens, not ", n);
  int64_t count = 2 + 3 * rows + 2 * sequences;
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
  CUDA_CHECK(cudaMemcpyAsync(integers_.data(), pinned_.data(), count * 4, cudaMemcpyHostToDevice, *stream_));
  batch_copied_->record(*stream_);
}

void CudaBackend::run(const Batch& batch, bool reads_out, const std::function<void(int64_t rows)>& operations) {
  const bool single = batch.is_decode();
  const int64_t rows = single ? std::min(bucket(batch.n_tokens()), max_rows_) : batch.n_tokens();
  in_step_ = true;
  try {
    stage_batch(batch, rows);
    if (single && replays_)
      graphs_.run({rows, pages_seen(0), reads_out}, *stream_, [&] { operations(rows); });
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

void CudaBackend::product(Mat<float> out, Mat<const float> t, const Weight& weight, const float* bias, Epilogue epilogue) {
  use();
  MatmulArgs args;
  args.x = rounded_input(t);
  args.codes = weight.storage.as<uint8_t>();
  args.scales = args.codes + arranged_scales_offset(weight.experts, weight.rows, weight.cols);
  args.rows = weight.rows;
  args.cols = weight.cols;
  args.n = t.rows;
  args.bias = bias;
  args.out = out.data;
  matmul(args, weight.format == WeightFormat::kMxfp4, epilogue, matmul_tile(t.rows), *stream_);
  forget(out.data);
}

// Pages that one row of the batch can see, at most: of a window, a constant; of all, rounded up to a power of two, so that
// few launches differ.
int64_t CudaBackend::pages_seen(int64_t window) const {
  const int64_t now = ceil_div(longest_, kPageTokens);
  const int64_t all = window ? ceil_div(window - 1, kPageTokens) + 1 : next_power_of_two(now);
  return std::min(all, std::max(now, context_pages_));
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
  args.n = q.rows;
  args.heads = q.cols / kHeadDim;
  args.kv_heads = kv_heads;
  args.window = cache.window;
  args.max_pages = pages_seen(cache.window);
  ensure(partial_, attention_partial_bytes(args));
  args.partial = partial_.as<float>();
  cuda::attention(args, *stream_);
  remember({out.data, out.rows, out.cols});
}

void CudaBackend::moe_add(Mat<float> x, Mat<const float> t, const Routing& top, const ExpertWeights& experts) {
  use();
  const Weight &gate_up = *experts.gate_up, &down = *experts.down;
  const int64_t k = top.experts.cols, slots = t.rows * k, n_experts = gate_up.experts;
  const int64_t tile = matmul_tile(ceil_div(slots, n_experts));
  const Rounded hidden = {hidden_.as<uint16_t>(), round_up(down.cols, 64)};
  MatmulArgs args;
  args.x = rounded_input(t);
  args.tiles = tiles_.as<TokenTile>();
  args.n_tiles = n_tiles_.as<int32_t>();
  args.max_tiles = slots / tile + std::min(slots, n_experts);
  args.slots = slots_.as<int32_t>();
  dispatch(slots_.as<int32_t>(), tiles_.as<TokenTile>(), n_tiles_.as<int32_t>(), top.experts.data, slots, n_experts, tile,
           *stream_);

  MatmulArgs up = args;
  up.codes = gate_up.storage.as<uint8_t>();
  up.scales = up.codes + arranged_scales_offset(n_experts, gate_up.rows, gate_up.cols);
  up.rows = gate_up.rows;
  up.cols = gate_up.cols;
  up.n = slots;
  up.bias = experts.gate_up_bias;
  up.hidden = hidden;
  up.limit = experts.swiglu_limit;
  up.gather = static_cast<int32_t>(k);
  matmul(up, true, Epilogue::kSwiglu, tile, *stream_);

  args.x = hidden;
  args.codes = down.storage.as<uint8_t>();
  args.scales = args.codes + arranged_scales_offset(n_experts, down.rows, down.cols);
  args.rows = down.rows;
  args.cols = down.cols;
  args.n = slots;
  args.bias = experts.down_bias;
  args.out = outputs_.as<float>();
  args.scatter = true;
  matmul(args, true, Epilogue::kStore, tile, *stream_);
  combine(x.data, outputs_.as<float>(), top.weights.data, t.rows, k, x.cols, *stream_);
  forget(x.data);
}

std::vector<Sample> CudaBackend::sample(Mat<float> logits, const std::vector<SampleRow>& rows) {
  use();
  const int64_t n = std::bit_ceil(rows.size());  // a launch serves all numbers of rows up to a power of two
  std::vector<StagedAdjustment> adjustments;
  std::vector<SampleParams> params(n);
  for (size_t i = 0; i < rows.size(); ++i)
    params[i] = stage_sample(adjustments, *rows[i].sampler, rows[i].row, rows[i].position);
  const int64_t at_adjustments = kAtSampleParams + n * static_cast<int64_t>(sizeof(SampleParams));
  const int64_t bytes = at_adjustments + std::ssize(adjustments) * static_cast<int64_t>(sizeof(StagedAdjustment));
  const int64_t result_bytes = n * static_cast<int64_t>(sizeof(SampleResult));
  if (static_cast<int64_t>(sample_pinned_.bytes()) < bytes) sample_pinned_ = pinned_memory(2 * bytes);
  if (static_cast<int64_t>(sample_results_host_.bytes()) < result_bytes) sample_results_host_ = pinned_memory(result_bytes);
  ensure(sample_staged_, static_cast<int64_t>(sample_pinned_.bytes()));
  ensure(sample_results_, result_bytes);
  ensure(sample_work_, sample_workspace_bytes(n, logits.cols));

  uint8_t *host = sample_pinned_.as<uint8_t>(), *device = sample_staged_.as<uint8_t>();
  *reinterpret_cast<int32_t*>(host) = static_cast<int32_t>(rows.size());
  std::copy(params.begin(), params.end(), reinterpret_cast<SampleParams*>(host + kAtSampleParams));
  std::copy(adjustments.begin(), adjustments.end(), reinterpret_cast<StagedAdjustment*>(host + at_adjustments));
  CUDA_CHECK(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, *stream_));
  cuda::sample(sample_results_.as<SampleResult>(), logits.data, reinterpret_cast<SampleParams*>(device + kAtSampleParams),
               reinterpret_cast<StagedAdjustment*>(device + at_adjustments), sample_work_.data(),
               reinterpret_cast<int32_t*>(device), n, logits.cols, *stream_);
  CUDA_CHECK(
      cudaMemcpyAsync(sample_results_host_.data(), sample_results_.data(), result_bytes, cudaMemcpyDeviceToHost, *stream_));
  stream_->wait();

  std::vector<Sample> samples;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].sampler->options().logprobs > kTopLogprobs)
      samples.push_back(Backend::sample(logits, {rows[i]}).front());
    else
      samples.push_back(finish_sample(sample_results_host_.as<SampleResult>()[i], *rows[i].sampler));
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
