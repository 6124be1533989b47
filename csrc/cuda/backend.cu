// The backend on a card: construction, memory, the way of weights onto it, and work space.
#include <algorithm>
#include <cstdlib>

#include "cuda/backend.cuh"

namespace gptoss::cuda {

CudaBackend::CudaBackend(int device, const BackendOptions& options)
    : device_(device), card_(device), max_tokens_(options.max_batch_tokens), max_rows_(max_tokens_) {
  CUDA_CHECK(cudaGetDeviceProperties(&properties_, device));
  hopper_ = properties_.major == 9 && !options.invariant;
  stream_ = std::make_unique<Stream>();
  batch_copied_ = std::make_unique<Event>();
  samples_copied_ = std::make_unique<Event>();
  stage_ = std::make_unique<Stage>();
  const char* graphs = std::getenv("GPTOSS_CUDA_GRAPHS");
  replays_ = !graphs || std::string(graphs) != "0";
}

CudaBackend::~CudaBackend() {
  if (cudaSetDevice(device_) == cudaSuccess) cudaStreamSynchronize(*stream_);
}

void CudaBackend::use() const {
  card_.check();
  int current = -1;
  CUDA_CHECK(cudaGetDevice(&current));
  if (current != device_) CUDA_CHECK(cudaSetDevice(device_));
}

// ------------------------------------------------------------------------------------------------------------ memory

Buffer CudaBackend::allocate(size_t bytes) {
  use();
  rounded_of_ = nullptr;
  Buffer buffer = device_memory(bytes);
  if (bytes > 0) CUDA_CHECK(cudaMemsetAsync(buffer.data(), 0, bytes, *stream_));
  return buffer;
}

void CudaBackend::copy_in(void* device, const void* host, size_t bytes) {
  use();
  rounded_of_ = nullptr;
  dispatched_ = nullptr;
  CUDA_CHECK(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, *stream_));
  stream_->wait();  // the host's memory may go
}

void CudaBackend::copy_out(void* host, const void* device, size_t bytes) {
  use();
  CUDA_CHECK(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, *stream_));
  stream_->wait();
}

size_t CudaBackend::available_memory() const {
  use();
  size_t free = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&free, &total));
  const size_t spare = std::min<size_t>(512 << 20, total / 16);  // for kernels, graphs, and others
  return free > spare ? free - spare : 0;
}

void CudaBackend::synchronize() {
  use();
  stream_->wait();
}

// ------------------------------------------------------------------------------------------------------------ weights

size_t CudaBackend::weight_bytes(WeightFormat format, int64_t experts, int64_t rows, int64_t cols) const {
  return format == WeightFormat::kTable ? rows * cols * 2 : arranged_bytes(format == WeightFormat::kMxfp4, experts, rows, cols);
}

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

void CudaBackend::finish_loading() {
  synchronize();
  stage_ = std::make_unique<Stage>();
}

// --------------------------------------------------------------------------------------------------------- work space

void CudaBackend::ensure(Buffer& buffer, int64_t bytes) {
  if (static_cast<int64_t>(buffer.bytes()) >= bytes) return;
  if (in_step_) FAIL("a step needs ", bytes, " bytes of work space where ", buffer.bytes(), " were reserved");
  stream_->wait();
  graphs_.clear();
  buffer = Buffer();
  buffer = device_memory(bytes);
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
  take(sample_masks_, logit_rows * Sampler::mask_words(config.vocab_size) * 4);
  take(sample_results_, logit_rows * static_cast<int64_t>(sizeof(SampleResult)));
  take(sample_work_, sample_workspace_bytes(logit_rows, config.vocab_size));
  take(attention_space_, attention_workspace_bytes(n, config.n_heads, config.n_kv_heads, limits.context));
}

size_t CudaBackend::workspace_bytes(const ModelConfig& config, const Limits& limits) {
  size_t bytes = 0;
  for_each_buffer(config, limits, [&](Buffer&, int64_t n) { bytes += n; });
  return bytes;
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
  sample_masks_pinned_ = pinned_memory(sample_masks_.bytes());
  sample_results_pinned_ = pinned_memory(sample_results_.bytes());
  // Columns past the end stay 0; rows that pad a batch are multiplied though nobody wants them.
  for (const Buffer* buffer : {&hidden_, &rounded_, &sample_results_, &counters_, &attention_space_})
    CUDA_CHECK(cudaMemsetAsync(buffer->data(), 0, buffer->bytes(), *stream_));
}

void CudaBackend::reserve_attention(int64_t rows, int64_t heads, int64_t kv_heads, int64_t context) {
  const int64_t bytes = attention_workspace_bytes(rows, heads, kv_heads, context);
  if (static_cast<int64_t>(attention_space_.bytes()) >= bytes) return;
  ensure(attention_space_, bytes);
  CUDA_CHECK(cudaMemsetAsync(attention_space_.data(), 0, bytes, *stream_));
}

}  // namespace gptoss::cuda
