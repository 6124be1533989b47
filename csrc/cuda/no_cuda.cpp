// Linked in place of the CUDA backend in a build without it, so that no caller needs an #ifdef.
#include "backend.h"

namespace gptoss {

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options) {
  FAIL("device \"", options.device, "\" was asked for, but this build of gptoss has no CUDA; use device=\"cpu\"");
}

bool cuda_available() { return false; }

}  // namespace gptoss
