// Rotary position embedding with YaRN: the frequencies of the pairs and the table of their cosines and sines.
#include <algorithm>
#include <cmath>
#include <numbers>

#include "model.h"

namespace gptoss {

std::vector<double> rope_frequencies(const ModelConfig& config) {
  constexpr int64_t pairs = kHeadDim / 2;
  std::vector<double> frequencies(pairs);
  for (int64_t i = 0; i < pairs; ++i) frequencies[i] = std::pow(config.rope_theta, -static_cast<double>(i) / pairs);
  if (config.rope_factor == 1) return frequencies;

  // The pair that turns `rotations` times within the original context.
  auto pair_of = [&](double rotations) {
    return pairs * std::log(static_cast<double>(config.rope_original_context) / (rotations * 2 * std::numbers::pi)) /
           std::log(config.rope_theta);
  };
  double low = pair_of(config.rope_beta_fast), high = pair_of(config.rope_beta_slow);
  if (config.rope_truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(kHeadDim - 1));
  if (low == high) high += 0.001;
  for (int64_t i = 0; i < pairs; ++i) {
    // Fast pairs keep their frequency, slow ones are stretched by the factor, a ramp between.
    const double stretched = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    frequencies[i] *= (1 - stretched) + stretched / config.rope_factor;
  }
  return frequencies;
}

void fill_rope_table(const ModelConfig& config, int64_t first, int64_t end, float* cos, float* sin) {
  const std::vector<double> frequencies = rope_frequencies(config);
  const int64_t pairs = static_cast<int64_t>(frequencies.size());
  for (int64_t position = first; position < end; ++position) {
    for (int64_t i = 0; i < pairs; ++i) {
      const double angle = static_cast<double>(position) * frequencies[i];
      cos[(position - first) * pairs + i] = static_cast<float>(std::cos(angle) * config.rope_attention_factor);
      sin[(position - first) * pairs + i] = static_cast<float>(std::sin(angle) * config.rope_attention_factor);
    }
  }
}

}  // namespace gptoss
