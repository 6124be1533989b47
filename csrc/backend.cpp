// What a backend does unless it knows better.
#include "backend.h"

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

}  // namespace gptoss
