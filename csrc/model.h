// A loaded model: weights, cache and work space on one backend, and the forward pass over ragged batches.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "backend.h"
#include "config.h"
#include "kv_cache.h"
#include "memory_plan.h"
#include "sampling.h"
#include "weights.h"

namespace gptoss {

struct ModelOptions {
  BackendOptions backend;
  int64_t max_context = 0;    // 0: the config's
  int64_t max_sequences = 0;  // 0: as memory allows, at most 256
  bool prefix_cache = false;  // full pages stay for sequences that begin alike
};

enum class Want { kNothing, kLast, kAll };  // rows whose logits a step computes

class Model;

// One sequence's place in the cache. Gives its pages back, and lets go of the model, when it is closed or goes. Several threads
// may call it.
class Sequence {
 public:
  explicit Sequence(std::shared_ptr<Model> model);
  ~Sequence();
  int64_t length() const { return cache_.length; }
  void truncate(int64_t length);
  int64_t reuse(const std::vector<int32_t>& tokens);  // see KvCache::reuse
  void close();

 private:
  friend class Model;
  struct Open {
    std::shared_ptr<Model> model;
    std::unique_lock<std::mutex> lock;  // of the model
  };
  Open open() const;  // throws if it is closed

  std::atomic<std::shared_ptr<Model>> model_;  // null: closed, under the model's lock
  SequenceCache cache_;
};

struct StepItem {
  Sequence* sequence = nullptr;
  std::vector<int32_t> tokens;  // appended to the sequence
  Want want = Want::kNothing;
  Sampler* sampler = nullptr;  // samples after the last token
  // So many of the last tokens are guesses. A token is drawn before each as if it were not there, and behind the last; the
  // first that is not the guess is the last that counts.
  int64_t n_drafts = 0;

  int64_t n_logits() const {  // rows
    return want == Want::kAll ? std::ssize(tokens) : want == Want::kLast ? 1 + n_drafts : 0;
  }
};

class Model : public std::enable_shared_from_this<Model> {
 public:
  Model(const ModelConfig& config, const ModelOptions& options);

  const ModelConfig& config() const { return config_; }
  const Backend& backend() const { return *backend_; }
  Precision precision() const { return precision_; }
  int64_t max_context() const { return plan_.limits.context; }
  int64_t max_batch_tokens() const { return plan_.limits.batch_tokens; }
  int64_t max_sequences() const { return plan_.limits.sequences; }

  void load(const HostTensor& tensor);
  void finish_loading();

  // Runs the items' tokens through the model. Wanted rows of logits, [vocab] each, go to `logits` in order if it is not null:
  // with drafts, Want::kLast is the rows of all samples. Returns the samples of each item: one with a sampler, none without,
  // and with drafts one more than there were right guesses; tokens behind those do not count. On any exception every sequence
  // and sampler is as it was. `poll` is called between layers and may throw.
  std::vector<std::vector<Sample>> step(const std::vector<StepItem>& items, float* logits, const std::function<void()>& poll);

  int64_t weight_bytes() const { return plan_.weight_bytes; }
  int64_t workspace_bytes() const { return plan_.workspace_bytes; }
  const KvCache& cache() const { return *cache_; }

 private:
  friend class Sequence;

  void check_items(const std::vector<StepItem>& items) const;
  Batch make_batch(const std::vector<StepItem>& items) const;
  void forward(int64_t n, const std::function<void()>& poll);  // tokens -> x_, n rows
  // x_ -> logits_: n rows, normed and unembedded; all of the batch, or those listed.      rows: [n] or null
  void unembed(int64_t n, const int32_t* rows);
  // Both run the batch, write the logits that are wanted to `logits` where it is not null, and draw samples.
  std::vector<std::vector<Sample>> decode(const Batch& batch, const std::vector<StepItem>& items, float* logits,
                                          const std::function<void()>& poll);
  std::vector<std::vector<Sample>> prefill(const Batch& batch, const std::vector<StepItem>& items, float* logits,
                                           const std::function<void()>& poll);
  void check_process() const;
  void extend_rope_table(int64_t end);
  std::vector<std::pair<Buffer*, int64_t>> work_space(const Limits& limits);  // and how many floats each is to be

  ModelConfig config_;
  Precision precision_;
  int process_;  // that made the model: threads do not survive a fork
  std::unique_ptr<Backend> backend_;
  MemoryPlan plan_;
  std::unique_ptr<WeightLoader> loader_;  // null: loaded
  Weights weights_;
  std::unique_ptr<KvCache> cache_;
  std::mutex mutex_;  // one step at a time

  // Work space of a step. n: tokens of the batch.
  Buffer x_;                    // [n, H] residual stream
  Buffer t_;                    // [n, H] normed
  Buffer qkv_;                  // [n, (heads + 2 kv_heads) * 64]
  Buffer q_;                    // [n, heads * 64]
  Buffer a_;                    // [n, heads * 64] attention output
  Buffer experts_;              // [n, k] ids
  Buffer expert_weights_;       // [n, k]
  Buffer logits_;               // [rows at a time, V]
  int64_t rope_end_ = 0;        // positions the rope tables hold so far
  Buffer rope_cos_, rope_sin_;  // [max_context, 32]
};

// Angle per position of each of the head_dim/2 pairs (YaRN: Peng et al. 2023, section 3.2, "NTK-by-parts").
std::vector<double> rope_frequencies(const ModelConfig& config);

// Cosines and sines of positions [first, end), times the attention factor. cos, sin: [end - first, 32]
void fill_rope_table(const ModelConfig& config, int64_t first, int64_t end, float* cos, float* sin);

}  // namespace gptoss
