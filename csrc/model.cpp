// The forward pass of gpt-oss, written once, top to bottom, for every backend.
#include "model.h"

#include <unistd.h>

#include <algorithm>
#include <set>

#include "check.h"

namespace gptoss {
namespace {

constexpr int64_t kLogitRows = 64;          // computed at a time: 51 MB of logits for the real vocabulary
constexpr size_t kSpareMemory = 512 << 20;  // not counted on for the cache
constexpr int64_t kDefaultSequences = 64;   // of full context that page numbers are made for

std::unique_ptr<Backend> make_backend(const BackendOptions& options) {
  if (options.device == "cpu") return make_cpu_backend(options);
  CHECK(options.device.rfind("cuda", 0) == 0, "device must be \"cpu\", \"cuda\" or \"cuda:N\", not \"", options.device, "\"");
  CHECK(options.precision == Precision::kExact, "precision \"fast\" is for the CPU: on ", options.device, " use \"exact\"");
  return make_cuda_backend(options);
}

}  // namespace

// ------------------------------------------------------------------------------------------------------- forward pass

void Model::forward(const Batch& batch, const std::function<void()>& poll) {
  const int64_t n = batch.n_tokens(), k = config_.experts_per_token, kv_heads = config_.n_kv_heads;
  const float eps = static_cast<float>(config_.rms_norm_eps), limit = static_cast<float>(config_.swiglu_limit);
  const auto x = x_.mat<float>(n, config_.hidden_size), t = t_.mat<float>(n, config_.hidden_size);
  const auto qkv = qkv_.mat<float>(n, config_.qkv_size());
  const auto q = q_.mat<float>(n, config_.q_size()), a = a_.mat<float>(n, config_.q_size());
  const Routing top = {experts_.mat<int32_t>(n, k), expert_weights_.mat<float>(n, k)};
  const RopeTable rope = {rope_cos_.mat<const float>(max_context_, kHeadDim / 2),
                          rope_sin_.mat<const float>(max_context_, kHeadDim / 2)};
  const auto read = [](Mat<float> m) { return Mat<const float>{m.data, m.rows, m.cols}; };
  Backend& op = *backend_;

  op.begin(batch);
  op.embed(x, weights_.embedding);
  for (int64_t i = 0; i < config_.n_layers; ++i) {
    poll();
    const LayerWeights& w = weights_.layers[i];
    const KvLayer kv = cache_->layer(i);
    op.rmsnorm(t, read(x), w.attn_norm.as<float>(), eps, nullptr);
    op.linear(qkv, read(t), w.qkv, w.qkv_bias.as<float>());
    op.rope_append(q, kv, read(qkv), rope, kv_heads);
    op.attention(a, read(q), kv, w.sinks.as<float>(), kv_heads);
    op.linear_add(x, read(a), w.out, w.out_bias.as<float>());
    op.rmsnorm(t, read(x), w.mlp_norm.as<float>(), eps, nullptr);
    op.route(top, read(t), w.router, w.router_bias.as<float>());
    op.moe_add(x, read(t), top, {&w.gate_up, w.gate_up_bias.as<float>(), &w.down, w.down_bias.as<float>(), limit});
  }
}

std::vector<std::optional<Sample>> Model::read_out(const std::vector<StepItem>& items, float* logits) {
  struct Row {
    int32_t row;
    int64_t item;
    bool sampled;
  };
  std::vector<Row> wanted;
  int32_t first = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    const int32_t n = static_cast<int32_t>(items[i].tokens.size());
    const int32_t skip = items[i].want == Want::kNothing ? n : items[i].want == Want::kLast ? n - 1 : 0;
    for (int32_t r = skip; r < n; ++r) wanted.push_back({first + r, static_cast<int64_t>(i), items[i].sampler && r == n - 1});
    first += n;
  }

  const int64_t H = config_.hidden_size, V = config_.vocab_size;
  std::vector<std::optional<Sample>> samples(items.size());
  std::vector<float> host;
  for (size_t begin = 0; begin < wanted.size(); begin += kLogitRows) {
    const int64_t n = std::min<int64_t>(kLogitRows, wanted.size() - begin);
    std::vector<int32_t> rows(n);
    for (int64_t i = 0; i < n; ++i) rows[i] = wanted[begin + i].row;
    const auto t = t_.mat<float>(n, H), out = logits_.mat<float>(n, V);
    backend_->rmsnorm(t, x_.mat<const float>(first, H), weights_.norm.as<float>(), static_cast<float>(config_.rms_norm_eps),
                      rows.data());
    backend_->linear(out, {t.data, n, H}, weights_.unembedding, nullptr);
    backend_->synchronize();
    if (logits) backend_->copy_out(logits + begin * V, out.data, n * V * sizeof(float));
    for (int64_t i = 0; i < n; ++i) {
      const Row& row = wanted[begin + i];
      if (!row.sampled) continue;
      host.resize(V);
      backend_->copy_out(host.data(), out.row(i), V * sizeof(float));
      const StepItem& item = items[row.item];
      const int64_t position = item.sequence->length() + static_cast<int64_t>(item.tokens.size());
      samples[row.item] = item.sampler->sample(host.data(), position);
    }
  }
  return samples;
}

// --------------------------------------------------------------------------------------------------------------- step

void Model::check_process() const {
  if (getpid() != process_)
    FAIL("this model was loaded before a fork, and its threads are in the parent process only: load it again in the child");
}

void Model::check_items(const std::vector<StepItem>& items) const {
  CHECK(!items.empty(), "items must not be empty");
  std::set<const Sequence*> seen;
  int64_t total = 0;
  for (const StepItem& item : items) {
    CHECK(item.sequence && item.sequence->model_.get() == this, "a sequence belongs to another model");
    CHECK(!item.sequence->closed_, "a sequence is closed");
    CHECK(seen.insert(item.sequence).second, "a sequence appears twice in one step");
    const int64_t n = static_cast<int64_t>(item.tokens.size()), length = item.sequence->length();
    CHECK(n > 0, "tokens must not be empty");
    for (int32_t token : item.tokens)
      CHECK(token >= 0 && token < config_.vocab_size, "token id ", token, " is outside the vocabulary of ", config_.vocab_size);
    CHECK(length + n <= max_context_, length, " tokens in the cache and ", n, " more are over max_context = ", max_context_);
    CHECK(!item.sampler || item.want == Want::kLast, "an item with a sampler must want the logits of its last token");
    CHECK(!item.sampler || item.sampler->vocab_size() == config_.vocab_size, "a sampler was made for a vocabulary of ",
          item.sampler->vocab_size(), ", not ", config_.vocab_size);
    total += n;
  }
  CHECK(total <= max_batch_tokens_, "a step takes at most ", max_batch_tokens_, " tokens, not ", total);
}

Batch Model::make_batch(const std::vector<StepItem>& items) const {
  Batch batch;
  for (const StepItem& item : items) {
    const SequenceCache& cache = item.sequence->cache_;
    const int64_t n = static_cast<int64_t>(item.tokens.size());
    const int32_t index = static_cast<int32_t>(batch.sequences.size());
    batch.sequences.push_back({batch.n_tokens(), n, cache.length, &cache.full, &cache.window});
    for (int64_t i = 0; i < n; ++i) {
      batch.tokens.push_back(item.tokens[i]);
      batch.positions.push_back(static_cast<int32_t>(cache.length + i));
      batch.sequence_of.push_back(index);
    }
  }
  return batch;
}

std::vector<std::optional<Sample>> Model::step(const std::vector<StepItem>& items, float* logits,
                                               const std::function<void()>& poll) {
  check_process();
  std::lock_guard lock(mutex_);
  CHECK(cache_, "the model is not loaded yet");
  check_items(items);
  try {
    for (const StepItem& item : items) {
      const int64_t n = static_cast<int64_t>(item.tokens.size());
      cache_->extend(item.sequence->cache_, n);
      extend_rope_table(item.sequence->length() + n);
    }
    forward(make_batch(items), poll);
    std::vector<std::optional<Sample>> samples = read_out(items, logits);
    for (size_t i = 0; i < items.size(); ++i) {
      cache_->commit(items[i].sequence->cache_, static_cast<int64_t>(items[i].tokens.size()));
      if (samples[i]) items[i].sampler->record(samples[i]->token);
    }
    return samples;
  } catch (...) {
    for (const StepItem& item : items) cache_->trim(item.sequence->cache_);
    throw;
  }
}

Sequence::Sequence(std::shared_ptr<Model> model) : model_(std::move(model)) {
  CHECK(model_->cache_, "the model is not loaded yet");
}
Sequence::~Sequence() { close(); }

void Sequence::truncate(int64_t length) {
  std::lock_guard lock(model_->mutex_);
  CHECK(!closed_, "the sequence is closed");
  model_->cache_->truncate(cache_, length);
}

void Sequence::close() {
  if (closed_ || getpid() != model_->process_) return;  // in a forked child the lock may never be released
  std::lock_guard lock(model_->mutex_);
  closed_ = true;
  model_->cache_->release(cache_);
}

// ------------------------------------------------------------------------------------------------------------ loading

Model::Model(const ModelConfig& config, const ModelOptions& options)
    : config_(config),
      max_context_(options.max_context ? options.max_context : config.max_context),
      max_batch_tokens_(options.backend.max_batch_tokens),
      precision_(options.backend.precision),
      process_(getpid()) {
  config_.validate();
  CHECK(max_context_ >= 1 && max_context_ <= config.max_context, "max_context must be between 1 and the model's ",
        config.max_context, ", not ", max_context_);
  CHECK(max_batch_tokens_ >= 1 && max_batch_tokens_ <= 65536, "max_batch_tokens must be between 1 and 65536, not ",
        max_batch_tokens_);
  backend_ = make_backend(options.backend);
  loader_ = std::make_unique<WeightLoader>(*backend_, config_);
  weight_bytes_ = loader_->bytes();
  // Memory is taken as tensors arrive; a machine that runs out of it half way through would crawl rather than fail.
  constexpr double kGiB = 1 << 30;
  if (const size_t available = backend_->available_memory(); static_cast<size_t>(weight_bytes_) > available)
    FAIL("the weights take ", static_cast<double>(weight_bytes_) / kGiB, " GiB of memory, but only ",
         static_cast<double>(available) / kGiB, " GiB are available");
}

void Model::load(const HostTensor& tensor) {
  check_process();
  std::lock_guard lock(mutex_);
  CHECK(loader_, tensor.name, ": the model is already loaded");
  loader_->load(tensor);
}

void Model::finish_loading() {
  check_process();
  std::lock_guard lock(mutex_);
  CHECK(loader_, "the model is already loaded");
  weights_ = loader_->finish();
  loader_.reset();

  const int64_t n = max_batch_tokens_, k = config_.experts_per_token;
  auto floats = [&](int64_t count) { return backend_->allocate(count * sizeof(float)); };
  backend_->reserve(config_);
  x_ = floats(n * config_.hidden_size);
  t_ = floats(std::max(n, kLogitRows) * config_.hidden_size);
  qkv_ = floats(n * config_.qkv_size());
  q_ = floats(n * config_.q_size());
  a_ = floats(n * config_.q_size());
  experts_ = floats(n * k);
  expert_weights_ = floats(n * k);
  logits_ = floats(kLogitRows * config_.vocab_size);
  rope_cos_ = floats(max_context_ * kHeadDim / 2);
  rope_sin_ = floats(max_context_ * kHeadDim / 2);

  // Page numbers for as many tokens as memory holds; pages themselves become resident as they are used.
  const int64_t per_page = 2 * backend_->page_bytes(config_.n_kv_heads) * config_.n_layers;
  const size_t available = backend_->available_memory();
  const int64_t fitting = available > kSpareMemory ? static_cast<int64_t>((available - kSpareMemory) / per_page) : 0;
  const int64_t context_pages = (max_context_ + kPageTokens - 1) / kPageTokens;
  const int64_t n_pages = std::min(fitting, context_pages * kDefaultSequences);
  if (n_pages < 1) FAIL("no memory is left for the cache: a page of ", kPageTokens, " tokens takes ", per_page, " bytes");
  cache_ = std::make_unique<KvCache>(*backend_, config_, n_pages);
}

// Sines take a while to compute, and few sequences are long: the table grows as positions are first reached.
void Model::extend_rope_table(int64_t end) {
  constexpr int64_t kStep = 4096, kPairs = kHeadDim / 2;
  if (end <= rope_end_) return;
  end = std::min(max_context_, (end + kStep - 1) / kStep * kStep);
  const int64_t first = rope_end_ * kPairs, n = (end - rope_end_) * kPairs;
  std::vector<float> cos(n), sin(n);
  fill_rope_table(config_, rope_end_, end, cos.data(), sin.data());
  backend_->copy_in(rope_cos_.as<float>() + first, cos.data(), n * sizeof(float));
  backend_->copy_in(rope_sin_.as<float>() + first, sin.data(), n * sizeof(float));
  rope_end_ = end;
}

int64_t Model::workspace_bytes() const {
  int64_t bytes = 0;
  for (const Buffer* buffer : {&x_, &t_, &qkv_, &q_, &a_, &experts_, &expert_weights_, &logits_, &rope_cos_, &rope_sin_})
    bytes += static_cast<int64_t>(buffer->bytes());
  return bytes;
}

}  // namespace gptoss
