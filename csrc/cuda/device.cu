// Which card a device's name means, whether it is there, and whether this build has kernels for it.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "cuda/backend.cuh"

namespace gptoss::cuda {
namespace {

constexpr int kOldestMajor = 8;  // bf16 mma, cp.async

int device_index(const std::string& device) {
  if (device == "cuda") return 0;
  const std::string digits = device.rfind("cuda:", 0) == 0 ? device.substr(5) : "";
  CHECK(!digits.empty() && digits.size() < 5 && digits.find_first_not_of("0123456789") == std::string::npos,
        "device must be \"cuda\" or \"cuda:N\", not \"", device, "\"");
  return std::stoi(digits);
}

// Throws unless the card is there and this build has kernels for it.
void check_device(const std::string& name, int device) {
  int n = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&n); status != cudaSuccess || n == 0) {
    cudaGetLastError();
    FAIL("device \"", name, "\" was asked for, but this machine has no usable GPU (",
         status == cudaSuccess ? "none found" : cudaGetErrorString(status), "); use device=\"cpu\"");
  }
  CHECK(device < n, "device \"", name, "\" was asked for, but this machine has ", n, n == 1 ? " GPU" : " GPUs");
  cudaDeviceProp properties{};
  CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  const int major = properties.major, minor = properties.minor;
  const auto refuse = [&](const std::string& why) {
    FAIL("device \"", name, "\" is a ", properties.name, " of compute capability ", major, ".", minor, ", but ", why,
         "; use device=\"cpu\"");
  };
  if (major < kOldestMajor) refuse(join("gptoss needs ", kOldestMajor, ".0 or newer"));
  const std::vector<int> built = {__CUDA_ARCH_LIST__};  // 800, 900, ...: binaries run on cards of the same major number
  if (std::none_of(built.begin(), built.end(), [&](int arch) { return arch / 100 == major && arch % 100 / 10 <= minor; }))
    refuse(join("this build has kernels for ", built, " only (times 100)"));
}

}  // namespace
}  // namespace gptoss::cuda

namespace gptoss {

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options) {
  const int device = cuda::device_index(options.device);
  cuda::CardUse::revive(device);
  cuda::check_device(options.device, device);
  return std::make_unique<cuda::CudaBackend>(device, options);
}

bool cuda_available() {
  try {
    cuda::check_device("cuda", 0);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace gptoss
