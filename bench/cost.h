// What a step of a whole model must do at least: bytes that it reads, and operations.
#pragma once
#include <algorithm>
#include <cmath>

#include "backend.h"

namespace gptoss::bench {

struct StepCost {
  double bytes = 0;  // weights and cache, each once
  double flops = 0;  // of matrix products and attention
};

// `rows` tokens in `sequences` equal parts, each behind `context` tokens, of which `logits` are unembedded. Tokens choose their
// experts evenly: of E, n tokens meet E (1 - (1 - k/E)^n).
inline StepCost step_cost(const ModelConfig& c, int64_t rows, int64_t sequences, int64_t context, int64_t logits,
                          Precision precision) {
  const double n = static_cast<double>(rows), H = static_cast<double>(c.hidden_size);
  const double E = static_cast<double>(c.n_experts), k = static_cast<double>(c.experts_per_token);
  const double attention = H * static_cast<double>(c.qkv_size() + c.q_size());
  const double expert = 3 * H * static_cast<double>(c.intermediate_size), unembedding = H * static_cast<double>(c.vocab_size);
  const double met = E * (1 - std::pow(1 - k / E, n));
  StepCost cost;
  const double weight = precision == Precision::kFast ? 66.0 / 64 : 2;  // bytes, of attention and unembedding
  cost.bytes = logits > 0 ? weight * unembedding : 0;
  cost.flops = 2 * static_cast<double>(logits) * unembedding;
  const int64_t each = rows / sequences;
  for (int64_t window : c.layer_windows) {
    const double kept = static_cast<double>(context + each);  // keys of a sequence that some row sees, and the mean of a row
    const double seen = static_cast<double>(context) + static_cast<double>(each + 1) / 2;
    const double w = window ? static_cast<double>(window) : kept;
    const double keys = std::min(kept, w + static_cast<double>(each) - 1), mean = std::min(seen, w);
    cost.bytes += weight * attention + 2 * E * H + met * expert * 17 / 32;
    cost.bytes += static_cast<double>(sequences) * keys * static_cast<double>(c.kv_size()) * 4;
    cost.flops += 2 * n * (attention + E * H + k * expert) + 4 * n * mean * static_cast<double>(c.q_size());
  }
  return cost;
}

}  // namespace gptoss::bench
