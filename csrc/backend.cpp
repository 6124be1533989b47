// What a backend does unless it knows better.
#include "backend.h"

#include "check.h"

namespace gptoss {

std::vector<Sample> Backend::take_samples(Mat<const float> logits) {
  std::vector<Sample> samples;
  std::vector<float> row(logits.cols);
  for (const SampleRequest& request : asked_) {
    copy_out(row.data(), logits.row(request.row), logits.cols * sizeof(float));
    samples.push_back(request.sampler->sample(row.data(), request.position));
  }
  return samples;
}

Precision precision_of(const std::string& name) {
  for (Precision precision : {Precision::kExact, Precision::kFast})
    if (name == precision_name(precision)) return precision;
  CHECK(false, "precision must be \"exact\" or \"fast\", not \"", name, "\"");
}

const char* precision_name(Precision precision) { return precision == Precision::kFast ? "fast" : "exact"; }

}  // namespace gptoss
