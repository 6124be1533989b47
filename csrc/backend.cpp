// What a backend does unless it knows better.
#include "backend.h"

#include "check.h"

namespace gptoss {

std::vector<std::optional<Sample>> Backend::take_samples(Mat<const float> logits) {
  std::vector<std::optional<Sample>> samples;
  for (size_t i = 0; i < asked_.size(); ++i) {
    const int32_t guess = asked_[i].guess;
    const bool wanted = guess < 0 || (samples.back() && samples.back()->token == guess);
    try {
      samples.push_back(wanted ? std::optional(take_sample(i, logits)) : std::nullopt);
    } catch (CannotSample& error) {
      error.item = asked_[i].item;
      throw;
    }
  }
  return samples;
}

Sample Backend::take_sample(size_t i, Mat<const float> logits) {
  std::vector<float> row(logits.cols);
  copy_out(row.data(), logits.row(asked_[i].row), row.size() * sizeof(float));
  return asked_[i].sampler->sample(row.data(), asked_[i].position);
}

Precision precision_of(const std::string& name) {
  for (Precision precision : {Precision::kExact, Precision::kFast})
    if (name == precision_name(precision)) return precision;
  CHECK(false, "precision must be \"exact\" or \"fast\", not \"", name, "\"");
}

const char* precision_name(Precision precision) { return precision == Precision::kFast ? "fast" : "exact"; }

}  // namespace gptoss
