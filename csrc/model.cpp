// The forward pass of gpt-oss, written once, top to bottom, for every backend.
#include "model.h"

#include <unistd.h>

#include <algorithm>
#include <deque>
#include <set>

#include "check.h"

namespace gptoss {
namespace {

std::unique_ptr<Backend> make_backend(const BackendOptions& options) {
  if (options.device == "cpu") return make_cpu_backend(options);
  CHECK(options.device.rfind("cuda", 0) == 0, "device must be \"cpu\", \"cuda\" or \"cuda:N\", not \"", options.device, "\"");
  CHECK(options.precision == Precision::kExact, "precision \"fast\" is for the CPU: on ", options.device, " use \"exact\"");
  return make_cuda_backend(options);
}

}  // namespace

// ------------------------------------------------------------------------------------------------------- forward pass

void Model::forward(int64_t n, const std::function<void()>& poll) {
  const int64_t k = config_.experts_per_token, kv_heads = config_.n_kv_heads;
  const float eps = static_cast<float>(config_.rms_norm_eps), limit = static_cast<float>(config_.swiglu_limit);
  const auto x = x_.mat<float>(n, config_.hidden_size), t = t_.mat<float>(n, config_.hidden_size);
  const auto qkv = qkv_.mat<float>(n, config_.qkv_size());
  const auto q = q_.mat<float>(n, config_.q_size()), a = a_.mat<float>(n, config_.q_size());
  const Routing top = {experts_.mat<int32_t>(n, k), expert_weights_.mat<float>(n, k)};
  const RopeTable rope = {rope_cos_.mat<const float>(max_context(), kHeadDim / 2),
                          rope_sin_.mat<const float>(max_context(), kHeadDim / 2)};
  const auto read = [](Mat<float> m) { return Mat<const float>{m.data, m.rows, m.cols}; };
  Backend& op = *backend_;

  op.embed(x, weights_.embedding);
  for (int64_t i = 0; i < config_.n_layers; ++i) {
    poll();
    const LayerWeights& w = weights_.layers[i];
    const KvLayer kv = cache_->layer(i);
    op.norm_qkv(q, kv, read(x), {w.attn_norm.as<float>(), eps}, w.qkv, w.qkv_bias.as<float>(), rope, kv_heads, t, qkv);
    op.attention(a, read(q), kv, w.sinks.as<float>(), kv_heads);
    op.linear_add(x, read(a), w.out, w.out_bias.as<float>());
    op.norm_route(top, t, read(x), {w.mlp_norm.as<float>(), eps}, w.router, w.router_bias.as<float>());
    op.moe_add(x, read(t), top, {&w.gate_up, w.gate_up_bias.as<float>(), &w.down, w.down_bias.as<float>(), limit});
  }
}

void Model::unembed(int64_t n, const int32_t* rows) {
  const auto t = t_.mat<float>(n, config_.hidden_size);
  const auto x = x_.mat<const float>(rows ? max_batch_tokens() : n, config_.hidden_size);
  backend_->rmsnorm(t, x, weights_.norm.as<float>(), static_cast<float>(config_.rms_norm_eps), rows);
  backend_->linear(logits_.mat<float>(n, config_.vocab_size), {t.data, n, t.cols}, weights_.unembedding, nullptr);
}

namespace {

// The samples wanted of some rows of logits.
struct Wanted {
  std::vector<SampleRequest> requests;
  std::deque<Sampler> ahead;  // that have recorded guesses

  // place: of the row among those that the item wants, which come in order.
  void add(const std::vector<StepItem>& all, size_t item, int64_t row, int64_t place) {
    const StepItem& it = all[item];
    if (!it.sampler) return;
    const int64_t known = std::ssize(it.tokens) - it.n_drafts;  // tokens before the first guess
    const int32_t guess = place > 0 ? it.tokens[known + place - 1] : -1;
    const Sampler* sampler = place > 0 ? requests.back().sampler : it.sampler;
    if (place > 0 && sampler->has_penalties()) {
      ahead.push_back(*sampler);
      ahead.back().record(guess);
      sampler = &ahead.back();
    }
    requests.push_back({row, sampler, it.sequence->length() + known + place, guess, item});
  }
  void move(std::vector<std::vector<Sample>>& to, std::vector<std::optional<Sample>> drawn) const {
    for (size_t i = 0; i < drawn.size(); ++i)
      if (drawn[i]) to[requests[i].item].push_back(std::move(*drawn[i]));
  }
};

}  // namespace

// One token of each sequence, all followed by logits: the step of a generation, which a backend may replay as a whole.
std::vector<std::vector<Sample>> Model::decode(const Batch& batch, const std::vector<StepItem>& items, float* logits,
                                               const std::function<void()>& poll) {
  Wanted wanted;
  for (size_t i = 0; i < items.size(); ++i) wanted.add(items, i, static_cast<int64_t>(i), 0);
  const bool samples = !wanted.requests.empty();
  if (samples) backend_->ask_samples(wanted.requests);
  backend_->run(batch, samples ? StepEnd::kSamples : StepEnd::kLogits, [&](int64_t n) {
    forward(n, poll);
    unembed(n, nullptr);
    if (samples) backend_->draw_samples(logits_.mat<float>(n, config_.vocab_size));
  });
  const auto rows = logits_.mat<float>(batch.n_tokens(), config_.vocab_size);
  if (logits) backend_->copy_out(logits, rows.data, rows.size() * sizeof(float));
  std::vector<std::vector<Sample>> result(items.size());
  if (samples) wanted.move(result, backend_->take_samples({rows.data, rows.rows, rows.cols}));
  return result;
}

// Any other step; logits are computed for some rows at a time.
std::vector<std::vector<Sample>> Model::prefill(const Batch& batch, const std::vector<StepItem>& items, float* logits,
                                                const std::function<void()>& poll) {
  backend_->run(batch, StepEnd::kLayers, [&](int64_t n) { forward(n, poll); });
  struct Place {
    size_t item;
    int64_t place;  // among the rows that the item wants
  };
  std::vector<int32_t> rows;
  std::vector<Place> places;
  for (size_t i = 0; i < items.size(); ++i) {
    const int64_t n = items[i].n_logits(), first = batch.sequences[i].first_row + batch.sequences[i].n_rows - n;
    for (int64_t place = 0; place < n; ++place) {
      rows.push_back(static_cast<int32_t>(first + place));
      places.push_back({i, place});
    }
  }

  const int64_t n_rows = static_cast<int64_t>(rows.size()), V = config_.vocab_size;
  std::vector<std::vector<Sample>> result(items.size());
  for (int64_t begin = 0, end = 0; begin < n_rows; begin = end) {
    end = std::min(n_rows, begin + Limits::kPromptLogitRows);
    while (end < n_rows && places[end].place > 0 && items[places[end].item].sampler) --end;  // drafts stay together
    const auto out = logits_.mat<float>(end - begin, V);
    Wanted wanted;
    for (int64_t i = begin; i < end; ++i) wanted.add(items, places[i].item, i - begin, places[i].place);
    const bool samples = !wanted.requests.empty();
    if (samples) backend_->ask_samples(wanted.requests);
    unembed(out.rows, rows.data() + begin);
    if (samples) backend_->draw_samples(out);
    if (logits) backend_->copy_out(logits + begin * V, out.data, out.size() * sizeof(float));
    if (samples) wanted.move(result, backend_->take_samples({out.data, out.rows, V}));
  }
  return result;
}

// --------------------------------------------------------------------------------------------------------------- step

void Model::check_process() const {
  if (getpid() != process_)
    FAIL("this model was loaded before a fork, and its threads are in the parent process only: load it again in the child");
}

void Model::check_items(const std::vector<StepItem>& items) const {
  CHECK(!items.empty(), "items must not be empty");
  const int64_t n_items = static_cast<int64_t>(items.size());
  CHECK(n_items <= max_sequences(), "a step takes at most ", max_sequences(), " sequences, not ", n_items);
  std::set<const Sequence*> seen;
  int64_t total = 0;
  for (const StepItem& item : items) {
    const std::shared_ptr<Model> model = item.sequence ? item.sequence->model_.load() : nullptr;
    CHECK(model, "a sequence is closed");
    CHECK(model.get() == this, "a sequence belongs to another model");
    CHECK(seen.insert(item.sequence).second, "a sequence appears twice in one step");
    const int64_t n = static_cast<int64_t>(item.tokens.size()), length = item.sequence->length();
    CHECK(n > 0, "tokens must not be empty");
    for (int32_t token : item.tokens)
      CHECK(token >= 0 && token < config_.vocab_size, "token id ", token, " is outside the vocabulary of ", config_.vocab_size);
    CHECK(length + n <= max_context(), length, " tokens in the cache and ", n, " more are over max_context = ", max_context());
    CHECK(!item.sampler || item.want == Want::kLast, "an item with a sampler must want the logits of its last token");
    CHECK(!item.sampler || item.sampler->vocab_size() == config_.vocab_size, "a sampler was made for a vocabulary of ",
          item.sampler->vocab_size(), ", not ", config_.vocab_size);
    CHECK(item.n_drafts == 0 || item.sampler, "an item with drafts must have a sampler");
    const int64_t most_drafts = std::min(n, Limits::kPromptLogitRows) - 1;
    CHECK(item.n_drafts >= 0 && item.n_drafts <= most_drafts, "n_drafts must be between 0 and ", most_drafts, " for ", n,
          " tokens, not ", item.n_drafts);
    total += n;
  }
  CHECK(total <= max_batch_tokens(), "a step takes at most ", max_batch_tokens(), " tokens, not ", total);
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

std::vector<std::vector<Sample>> Model::step(const std::vector<StepItem>& items, float* logits,
                                             const std::function<void()>& poll) {
  check_process();
  std::lock_guard lock(mutex_);
  CHECK(!loader_, "the model is not loaded yet");
  check_items(items);
  try {
    for (const StepItem& item : items) {
      const int64_t n = static_cast<int64_t>(item.tokens.size());
      cache_->extend(item.sequence->cache_, n);
      extend_rope_table(item.sequence->length() + n);
    }
    const Batch batch = make_batch(items);
    const bool decodes = batch.is_decode() && std::all_of(items.begin(), items.end(),
                                                          [](const StepItem& item) { return item.want != Want::kNothing; });
    std::vector<std::vector<Sample>> samples =
        decodes ? decode(batch, items, logits, poll) : prefill(batch, items, logits, poll);
    for (size_t i = 0; i < items.size(); ++i) {
      const StepItem& item = items[i];
      SequenceCache& cache = item.sequence->cache_;
      const int64_t wrong = item.n_drafts > 0 ? item.n_drafts + 1 - std::ssize(samples[i]) : 0;
      cache_->commit(cache, std::ssize(item.tokens) - wrong, item.tokens.data());
      if (wrong > 0) cache_->trim(cache);
      for (const Sample& sample : samples[i]) item.sampler->record(sample.token);
    }
    return samples;
  } catch (...) {
    for (const StepItem& item : items) cache_->trim(item.sequence->cache_);
    throw;
  }
}

Sequence::Sequence(std::shared_ptr<Model> model) : model_(model) { CHECK(!model->loader_, "the model is not loaded yet"); }
Sequence::~Sequence() { close(); }

Sequence::Open Sequence::open() const {
  Open open = {model_.load(), {}};
  if (open.model) {
    open.model->check_process();
    open.lock = std::unique_lock(open.model->mutex_);
  }
  CHECK(model_.load(), "the sequence is closed");  // perhaps while this waited for the lock
  return open;
}

void Sequence::truncate(int64_t length) {
  const Open open = this->open();
  open.model->cache_->truncate(cache_, length);
}

int64_t Sequence::reuse(const std::vector<int32_t>& tokens) {
  const Open open = this->open();
  return open.model->cache_->reuse(cache_, tokens.data(), std::ssize(tokens));
}

void Sequence::close() {
  const std::shared_ptr<Model> model = model_.load();  // it may end here, after its lock
  if (!model || getpid() != model->process_) return;   // in a forked child the lock may never be released
  std::lock_guard lock(model->mutex_);
  model->cache_->release(cache_);
  model_.store(nullptr);
}

// ------------------------------------------------------------------------------------------------------------ loading

Model::Model(const ModelConfig& config, const ModelOptions& options)
    : config_(config), precision_(options.backend.precision), process_(getpid()) {
  config_.validate();
  const Limits asked = {options.backend.max_batch_tokens, options.max_sequences, options.max_context};
  CHECK(asked.context >= 0 && asked.context <= config.max_context, "max_context must be between 1 and the model's ",
        config.max_context, ", not ", asked.context);
  CHECK(asked.batch_tokens >= 1 && asked.batch_tokens <= 65536, "max_batch_tokens must be between 1 and 65536, not ",
        asked.batch_tokens);
  CHECK(asked.sequences >= 0 && asked.sequences <= 65536, "max_sequences must be between 1 and 65536, not ", asked.sequences);
  backend_ = make_backend(options.backend);
  plan_ = plan_memory(*backend_, config_, asked, options.prefix_cache, [this](const Limits& limits) {
    int64_t bytes = static_cast<int64_t>(backend_->workspace_bytes(config_, limits));
    for (const auto& [buffer, floats] : work_space(limits)) bytes += floats * static_cast<int64_t>(sizeof(float));
    return bytes;
  });
  // All of it now: what is short must show before a checkpoint is read.
  loader_ = std::make_unique<WeightLoader>(*backend_, config_);
  backend_->reserve(config_, plan_.limits);
  for (const auto& [buffer, floats] : work_space(plan_.limits)) *buffer = backend_->allocate(floats * sizeof(float));
  cache_ = std::make_unique<KvCache>(*backend_, config_, plan_.full_pages, plan_.window_pages, plan_.cached_pages);
}

std::vector<std::pair<Buffer*, int64_t>> Model::work_space(const Limits& limits) {
  const int64_t n = limits.batch_tokens, k = config_.experts_per_token, rope = limits.context * kHeadDim / 2;
  const int64_t logit_rows = limits.logit_rows();
  return {{&x_, n * config_.hidden_size},
          {&t_, n * config_.hidden_size},
          {&qkv_, n * config_.qkv_size()},
          {&q_, n * config_.q_size()},
          {&a_, n * config_.q_size()},
          {&experts_, n * k},
          {&expert_weights_, n * k},
          {&logits_, logit_rows * config_.vocab_size},
          {&rope_cos_, rope},
          {&rope_sin_, rope}};
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
}

// Sines take a while to compute, and few sequences are long: the table grows as positions are first reached.
void Model::extend_rope_table(int64_t end) {
  constexpr int64_t kStep = 4096, kPairs = kHeadDim / 2;
  if (end <= rope_end_) return;
  end = std::min(max_context(), (end + kStep - 1) / kStep * kStep);
  const int64_t first = rope_end_ * kPairs, n = (end - rope_end_) * kPairs;
  std::vector<float> cos(n), sin(n);
  fill_rope_table(config_, rope_end_, end, cos.data(), sin.data());
  backend_->copy_in(rope_cos_.as<float>() + first, cos.data(), n * sizeof(float));
  backend_->copy_in(rope_sin_.as<float>() + first, sin.data(), n * sizeof(float));
  rope_end_ = end;
}

}  // namespace gptoss
