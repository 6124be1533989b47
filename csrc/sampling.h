// From one row of logits to one token.
//
// In this order: tokens that a mask forbids are left out; logit_bias is added; repetition, presence and frequency penalties; at
// temperature 0 the largest logit wins (ties: the lower id); else logits are divided by the temperature, the top_k largest stay
// (ties: lower ids), of those the smallest set of the most probable that reaches top_p of their mass, of those the ones with at
// least min_p of the largest probability; and one of the rest is drawn by its probability. The random number depends on seed
// and position alone, so a sequence repeats whatever it is batched with. Log-probabilities are those of the model, before any
// of this.
#pragma once
#include <cmath>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace gptoss {

struct SamplingOptions {
  double temperature = 1;
  int64_t top_k = 0;  // 0: all
  double top_p = 1;
  double min_p = 0;
  double repetition_penalty = 1;  // over prompt and output (Keskar et al. 2019, section 4.1)
  double presence_penalty = 0;    // over the output
  double frequency_penalty = 0;
  std::map<int64_t, double> logit_bias;
  uint64_t seed = 0;
  int64_t logprobs = -1;  // -1: none; n: of the chosen token and of the n most probable
};

#ifdef __CUDACC__
#define GPTOSS_HOST_DEVICE __host__ __device__
#else
#define GPTOSS_HOST_DEVICE
#endif

struct Penalties {
  double repetition = 1, presence = 0, frequency = 0;
};

// What is done to the logit of one token before anything is drawn.
struct TokenAdjustment {
  int32_t token = 0;
  float bias = 0;
  int32_t repeated = 0;  // whether repetition_penalty applies: the token is in the prompt or the output
  int32_t count = 0;     // in the output
};

// Written once for the host and the kernels. A NaN (an infinity and a bias of the other) is a token that cannot be drawn.
GPTOSS_HOST_DEVICE inline float adjusted(float logit, const TokenAdjustment& by, const Penalties& penalties) {
  logit += by.bias;
  const double x = logit;
  if (by.repeated) logit = static_cast<float>(x > 0 ? x / penalties.repetition : x * penalties.repetition);
  if (by.count > 0)
    logit = static_cast<float>(logit - penalties.presence - penalties.frequency * static_cast<double>(by.count));
  return logit == logit ? logit : -HUGE_VALF;
}

struct Sample {
  int32_t token = 0;
  double logprob = 0;
  std::vector<std::pair<int32_t, double>> top;  // most probable first
};

class Sampler {
 public:
  Sampler(int64_t vocab_size, SamplingOptions options);

  int64_t vocab_size() const { return vocab_size_; }
  const SamplingOptions& options() const { return options_; }
  Penalties penalties() const { return {options_.repetition_penalty, options_.presence_penalty, options_.frequency_penalty}; }
  bool has_penalties() const;  // whether a token that is recorded changes anything
  // By token, each token once.
  const std::vector<TokenAdjustment>& adjustments() const { return adjustments_; }
  void observe_prompt(const int32_t* tokens, int64_t n);
  // Only tokens whose bit is set may be drawn from now on; null: any.    mask: [mask_words], bit t % 32 of word t / 32
  void allow(const uint32_t* mask);
  static int64_t mask_words(int64_t vocab_size) { return (vocab_size + 31) / 32; }
  const std::vector<uint32_t>& mask() const { return mask_; }  // empty: any token
  // logits: [vocab_size]; position: of the token to be sampled in its sequence. Throws if the logits are not numbers.
  Sample sample(const float* logits, int64_t position) const;
  void record(int32_t token);

 private:
  void check_token(int32_t token) const;
  TokenAdjustment& adjustment_of(int32_t token);
  bool allows(int32_t token) const { return mask_.empty() || (mask_[token / 32] >> token % 32 & 1); }
  int32_t draw(const float* logits, int64_t position) const;
  void add_logprobs(Sample& sample, const float* logits) const;

  int64_t vocab_size_;
  SamplingOptions options_;
  std::vector<TokenAdjustment> adjustments_;
  std::vector<uint32_t> mask_;  // bits past the vocabulary are 0
};

// No token can be drawn from a row of logits.
class CannotSample : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  size_t item = 0;  // of a step: whose row it is
};

// What sampling throws of such logits, wherever it is done.
[[noreturn]] void fail_not_numbers(int64_t n);
[[noreturn]] void fail_no_maximum(float top);

// A number in [0, 1) for a seed and a position: Philox4x32-10 (Salmon et al., SC 2011), 53 bits of it.
double uniform(uint64_t seed, uint64_t position);

// Finds the first of several stop strings in text that comes in pieces, holding back what may still become one.
class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> stops);
  struct Result {
    std::string text;  // may be shown
    bool stopped;      // a stop string followed it; everything after is dropped
  };
  Result push(std::string_view piece);
  std::string flush();  // at the end of the text: what was held back

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace gptoss
