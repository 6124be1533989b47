// A step on a card: its batch as integers there, the graph that replays it, and its samples.
//
// A batch of single tokens is filled up to one of a few sizes (bucket), and its step is replayed as a CUDA graph (graphs.h).
#include <algorithm>
#include <cstring>

#include "cuda/backend.cuh"

namespace gptoss::cuda {
namespace {

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

}  // namespace

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
  longest_ = 0;
  const auto add = [&](std::vector<int32_t>& base, const PageList& list) {
    base.push_back(static_cast<int32_t>(static_cast<int64_t>(pages.size()) - list.first_page));
    pages.insert(pages.end(), list.pages.begin(), list.pages.end());
  };
  for (const BatchSequence& s : batch.sequences) {
    add(full_base, *s.full_pages);
    add(window_base, *s.window_pages);
    longest_ = std::max(longest_, s.position + s.n_rows);
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

// Pages that one row of the batch can see, at most: of a window, a constant; of all, rounded up to a power of two, so that
// few launches differ.
int64_t CudaBackend::pages_seen(int64_t window) const {
  const int64_t now = ceil_div(longest_, kPageTokens);
  const int64_t all = window ? ceil_div(window - 1, kPageTokens) + 1 : next_power_of_two(now);
  return std::min(all, std::max(now, context_pages_));
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

// ------------------------------------------------------------------------------------------------------------ samples

// Staged: how many rows, their parameters, and at fixed places the adjustments and masks of all. Launches depend on the rows of
// the logits alone.
void CudaBackend::ask_samples(const std::vector<SampleRequest>& requests) {
  use();
  asked_ = requests;
  std::vector<SampleParams> params;
  std::vector<StagedAdjustment> adjustments;
  std::vector<const uint32_t*> masks;
  for (const SampleRequest& request : requests)
    params.push_back(stage_sample(adjustments, masks, *request.sampler, request.row, request.position));
  samples_on_host_ = std::ssize(adjustments) > kMostAdjustments;
  if (samples_on_host_) {
    params.clear();
    adjustments.clear();
    masks.clear();
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
  samples_copied_->wait();  // the last copies, where a step failed before it took its samples
  const int32_t head[4] = {static_cast<int32_t>(params.size())};
  send(sample_params_pinned_, sample_params_, head, sizeof head, params.data(), params.size() * sizeof(SampleParams));
  if (!adjustments.empty())
    send(sample_adjustments_pinned_, sample_adjustments_, head, 0, adjustments.data(),
         adjustments.size() * sizeof(StagedAdjustment));
  if (!masks.empty()) stage_masks(masks, Sampler::mask_words(requests[0].sampler->vocab_size()) * 4);
  samples_copied_->record(*stream_);
}

// masks: each of so many bytes. What is pinned for them is not being copied.
void CudaBackend::stage_masks(const std::vector<const uint32_t*>& masks, int64_t bytes) {
  ensure(sample_masks_, std::max<int64_t>(std::ssize(masks), max_logit_rows_) * bytes);
  if (sample_masks_pinned_.bytes() < sample_masks_.bytes()) sample_masks_pinned_ = pinned_memory(sample_masks_.bytes());
  for (size_t i = 0; i < masks.size(); ++i) std::memcpy(sample_masks_pinned_.as<uint8_t>() + i * bytes, masks[i], bytes);
  CUDA_CHECK(cudaMemcpyAsync(sample_masks_.data(), sample_masks_pinned_.data(), masks.size() * bytes, cudaMemcpyHostToDevice,
                             *stream_));
}

void CudaBackend::draw_samples(Mat<float> logits) {
  use();
  const int64_t n = logits.rows, bytes = n * static_cast<int64_t>(sizeof(SampleResult));
  ensure(sample_results_, bytes);
  ensure(sample_work_, sample_workspace_bytes(n, logits.cols));
  if (sample_results_pinned_.bytes() < sample_results_.bytes()) sample_results_pinned_ = pinned_memory(sample_results_.bytes());
  const uint8_t* staged = sample_params_.as<uint8_t>();
  cuda::sample(sample_results_.as<SampleResult>(), logits.data, reinterpret_cast<const SampleParams*>(staged + 16),
               sample_adjustments_.as<StagedAdjustment>(), sample_masks_.as<uint32_t>(), sample_work_.data(),
               reinterpret_cast<const int32_t*>(staged), n, logits.cols, *stream_);
  CUDA_CHECK(cudaMemcpyAsync(sample_results_pinned_.data(), sample_results_.data(), bytes, cudaMemcpyDeviceToHost, *stream_));
}

std::vector<std::optional<Sample>> CudaBackend::take_samples(Mat<const float> logits) {
  use();
  stream_->wait();
  return Backend::take_samples(logits);
}

Sample CudaBackend::take_sample(size_t i, Mat<const float> logits) {
  const Sampler& sampler = *asked_[i].sampler;
  if (samples_on_host_ || sampler.options().logprobs > kTopLogprobs) return Backend::take_sample(i, logits);
  return finish_sample(sample_results_pinned_.as<SampleResult>()[i], sampler);
}

}  // namespace gptoss::cuda
