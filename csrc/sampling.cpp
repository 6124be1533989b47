#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "check.h"

namespace gptoss {
namespace {

// Orders token ids by logit, largest first; equal ones by id.
struct Better {
  const float* logits;
  bool operator()(int32_t a, int32_t b) const { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; }
};

void keep_best(std::vector<int32_t>& ids, int64_t n, const float* logits) {
  if (n >= static_cast<int64_t>(ids.size())) return;
  std::nth_element(ids.begin(), ids.begin() + n, ids.end(), Better{logits});
  ids.resize(n);
}

int32_t largest(const float* logits, int64_t n) { return static_cast<int32_t>(std::max_element(logits, logits + n) - logits); }

// Keeps the most probable ids whose mass first reaches top_p of the whole.
void keep_nucleus(std::vector<int32_t>& ids, double top_p, const float* logits, float top, double temperature) {
  auto weight = [&](int32_t id) { return std::exp((static_cast<double>(logits[id]) - top) / temperature); };
  double total = 0;
  for (int32_t id : ids) total += weight(id);
  double mass = 0;
  size_t sorted = 0;  // a nucleus is mostly small: sort as far as needed
  for (size_t n = 0; n < ids.size(); ++n) {
    if (n == sorted) {
      sorted = std::min(ids.size(), std::max<size_t>(64, sorted * 8));
      std::partial_sort(ids.begin() + n, ids.begin() + sorted, ids.end(), Better{logits});
    }
    mass += weight(ids[n]);
    if (mass >= top_p * total) {
      ids.resize(n + 1);
      return;
    }
  }
}

}  // namespace

double uniform(uint64_t seed, uint64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  uint32_t k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
                              static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  return static_cast<double>((uint64_t{c[0]} << 32 | c[1]) >> 11) * 0x1p-53;
}

Sampler::Sampler(int64_t vocab_size, SamplingOptions options) : vocab_size_(vocab_size), options_(std::move(options)) {
  const SamplingOptions& o = options_;
  CHECK(vocab_size > 0, "vocab_size must be positive, not ", vocab_size);
  CHECK(o.temperature >= 0 && std::isfinite(o.temperature), "temperature must be 0 or more, not ", o.temperature);
  CHECK(o.top_k >= 0, "top_k must be 0 (off) or more, not ", o.top_k);
  CHECK(o.top_p > 0 && o.top_p <= 1, "top_p must be in (0, 1], not ", o.top_p);
  CHECK(o.min_p >= 0 && o.min_p <= 1, "min_p must be in [0, 1], not ", o.min_p);
  CHECK(o.repetition_penalty > 0 && std::isfinite(o.repetition_penalty), "repetition_penalty must be over 0, not ",
        o.repetition_penalty);
  CHECK(std::isfinite(o.presence_penalty) && std::isfinite(o.frequency_penalty),
        "presence_penalty and frequency_penalty must be finite");
  CHECK(o.logprobs >= -1 && o.logprobs <= vocab_size, "logprobs must be between -1 and the vocabulary's size, not ",
        o.logprobs);
  for (const auto& [id, bias] : o.logit_bias) {
    CHECK(id >= 0 && id < vocab_size, "logit_bias: token id ", id, " is outside the vocabulary of ", vocab_size);
    CHECK(!std::isnan(bias) && bias < std::numeric_limits<float>::max(), "logit_bias of token ", id, " must be a number, not ",
          bias);
    adjustments_.push_back({static_cast<int32_t>(id), static_cast<float>(bias)});
  }
}

TokenAdjustment& Sampler::adjustment_of(int32_t token) {
  const auto before = [](const TokenAdjustment& a, int32_t id) { return a.token < id; };
  const auto place = std::lower_bound(adjustments_.begin(), adjustments_.end(), token, before);
  if (place != adjustments_.end() && place->token == token) return *place;
  return *adjustments_.insert(place, {token});
}

void Sampler::observe_prompt(const int32_t* tokens, int64_t n) {
  for (int64_t i = 0; i < n; ++i) check_token(tokens[i]);
  if (options_.repetition_penalty == 1) return;
  std::vector<int32_t> distinct(tokens, tokens + n);
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  std::vector<TokenAdjustment> merged;
  merged.reserve(adjustments_.size() + distinct.size());
  auto next = adjustments_.begin();
  for (int32_t token : distinct) {
    while (next != adjustments_.end() && next->token < token) merged.push_back(*next++);
    merged.push_back(next != adjustments_.end() && next->token == token ? *next++ : TokenAdjustment{token});
    merged.back().repeated = 1;
  }
  merged.insert(merged.end(), next, adjustments_.end());
  adjustments_ = std::move(merged);
}

void Sampler::allow(const uint32_t* mask) {
  if (!mask) return mask_.clear();
  std::vector<uint32_t> words(mask, mask + mask_words(vocab_size_));
  if (vocab_size_ % 32) words.back() &= (uint32_t{1} << vocab_size_ % 32) - 1;
  CHECK(std::any_of(words.begin(), words.end(), [](uint32_t word) { return word != 0; }), "mask allows none of the ",
        vocab_size_, " tokens");
  mask_ = std::move(words);
}

bool Sampler::has_penalties() const {
  const Penalties p = penalties();
  return p.repetition != 1 || p.presence != 0 || p.frequency != 0;
}

void Sampler::record(int32_t token) {
  check_token(token);
  if (!has_penalties()) return;
  TokenAdjustment& adjustment = adjustment_of(token);
  adjustment.repeated = 1;
  ++adjustment.count;
}

void Sampler::check_token(int32_t token) const {
  CHECK(token >= 0 && token < vocab_size_, "token id ", token, " is outside the vocabulary of ", vocab_size_);
}

void fail_not_numbers(int64_t n) { throw CannotSample(join("the logits have ", n, " values that are not a number")); }

void fail_no_maximum(float top) {
  throw CannotSample(join("the logits have no finite maximum (", top, "): nothing can be sampled"));
}

int32_t Sampler::draw(const float* logits, int64_t position) const {
  const SamplingOptions& o = options_;
  const int32_t best = largest(logits, vocab_size_);
  const float top = logits[best];
  if (!std::isfinite(top)) fail_no_maximum(top);
  if (o.temperature == 0 || o.top_k == 1) return best;
  std::vector<int32_t> ids;
  ids.reserve(vocab_size_);
  for (int32_t id = 0; id < vocab_size_; ++id)
    if (allows(id)) ids.push_back(id);
  if (o.top_k > 0) keep_best(ids, o.top_k, logits);
  if (o.top_p < 1) keep_nucleus(ids, o.top_p, logits, top, o.temperature);
  std::sort(ids.begin(), ids.end());
  std::vector<double> cumulative;
  cumulative.reserve(ids.size());
  double sum = 0;
  for (int32_t id : ids) {
    const double p = std::exp((static_cast<double>(logits[id]) - top) / o.temperature);
    cumulative.push_back(sum += p >= o.min_p ? p : 0);
  }
  const double target = uniform(o.seed, static_cast<uint64_t>(position)) * sum;
  const auto chosen = std::upper_bound(cumulative.begin(), cumulative.end(), target);
  return chosen == cumulative.end() ? best : ids[chosen - cumulative.begin()];
}

void Sampler::add_logprobs(Sample& sample, const float* logits) const {
  const double top = logits[largest(logits, vocab_size_)];
  double sum = 0;
  for (int64_t i = 0; i < vocab_size_; ++i) sum += std::exp(logits[i] - top);
  const double log_sum = top + std::log(sum);
  sample.logprob = logits[sample.token] - log_sum;
  if (options_.logprobs == 0) return;
  std::vector<int32_t> ids(vocab_size_);
  std::iota(ids.begin(), ids.end(), 0);
  keep_best(ids, options_.logprobs, logits);
  std::sort(ids.begin(), ids.end(), Better{logits});
  for (int32_t id : ids) sample.top.emplace_back(id, logits[id] - log_sum);
}

Sample Sampler::sample(const float* logits, int64_t position) const {
  // A NaN would make comparisons, and so the choice, depend on its place.
  int64_t not_numbers = 0;
  for (int64_t i = 0; i < vocab_size_; ++i) not_numbers += logits[i] != logits[i];
  if (not_numbers > 0) fail_not_numbers(not_numbers);
  Sample sample;
  if (adjustments_.empty() && mask_.empty()) {
    sample.token = draw(logits, position);
  } else {
    std::vector<float> row(logits, logits + vocab_size_);
    for (const TokenAdjustment& a : adjustments_) row[a.token] = adjusted(row[a.token], a, penalties());
    if (!mask_.empty())
      for (int32_t id = 0; id < vocab_size_; ++id)
        if (!allows(id)) row[id] = -HUGE_VALF;
    sample.token = draw(row.data(), position);
  }
  if (options_.logprobs >= 0) add_logprobs(sample, logits);
  return sample;
}

StopMatcher::StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& stop : stops_) CHECK(!stop.empty(), "stop: a stop string must not be empty");
}

StopMatcher::Result StopMatcher::push(std::string_view piece) {
  if (stopped_) return {"", true};
  held_ += piece;
  // Of several, the one that ends first (ties: the longest): what reading letter by letter would find.
  size_t begin = std::string::npos, end = std::string::npos;
  for (const std::string& stop : stops_) {
    const size_t found = held_.find(stop);
    if (found == std::string::npos) continue;
    if (found + stop.size() < end || (found + stop.size() == end && found < begin)) {
      begin = found;
      end = found + stop.size();
    }
  }
  if (begin != std::string::npos) {
    stopped_ = true;
    std::string text = held_.substr(0, begin);
    held_.clear();
    return {std::move(text), true};
  }
  size_t keep = 0;  // the longest end of the text that begins a stop string
  for (const std::string& stop : stops_)
    for (size_t n = std::min(stop.size() - 1, held_.size()); n > keep; --n)
      if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) {
        keep = n;
        break;
      }
  std::string text = held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return {std::move(text), false};
}

std::string StopMatcher::flush() { return std::exchange(held_, {}); }

}  // namespace gptoss
