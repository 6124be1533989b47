// What a backend does unless it knows better.
#include "backend.h"

namespace gptoss {

std::vector<Sample> Backend::sample(Mat<float> logits, const std::vector<SampleRequest>& requests) {
  std::vector<Sample> samples;
  std::vector<float> row(logits.cols);
  for (const SampleRequest& request : requests) {
    copy_out(row.data(), logits.row(request.row), logits.cols * sizeof(float));
    samples.push_back(request.sampler->sample(row.data(), request.position));
  }
  return samples;
}

}  // namespace gptoss
