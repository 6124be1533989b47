// See runtime.h.
#include "cuda/emulator/runtime.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

struct EmulatedGraph {
  std::vector<std::function<void()>> nodes;  // in stream order
  bool spoilt = false;
};
struct EmulatedStream {
  EmulatedGraph* capture = nullptr;
};

namespace gptoss::emulator {
namespace {

std::mutex mutex;                                 // of what follows
std::map<void*, size_t> allocations;              // on the card
size_t in_use = 0;                                // bytes
cudaError_t failure = cudaSuccess;                // of a kernel: what every call returns
std::string armed;                                // the GPTOSS_EMULATOR_FAIL that is counted down
long kernels_left = 0;                            // 0: none is to fail
thread_local EmulatedGraph* capturing = nullptr;  // by this thread
thread_local int current_device = 0;

size_t setting(const char* name, size_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

cudaError_t status() {
  std::lock_guard lock(mutex);
  return failure;
}

// Of a call that a capture does not allow.
cudaError_t status_outside_capture() {
  if (!capturing) return status();
  capturing->spoilt = true;
  return cudaErrorStreamCaptureUnsupported;
}

// Does it, or keeps it where the stream is captured.
cudaError_t submit(cudaStream_t stream, std::function<void()> work) {
  if (const cudaError_t error = status(); error != cudaSuccess) return error;
  if (stream && stream->capture)
    stream->capture->nodes.push_back(std::move(work));
  else
    work();
  return cudaSuccess;
}

// Counts a kernel; whether it is the one that fails.
bool fails_now() {
  std::lock_guard lock(mutex);
  const char* text = std::getenv("GPTOSS_EMULATOR_FAIL");
  if (armed != (text ? text : "")) {
    armed = text ? text : "";
    kernels_left = std::atol(armed.c_str());
  }
  if (kernels_left > 0 && --kernels_left == 0) failure = cudaErrorIllegalAddress;
  return failure != cudaSuccess;
}

}  // namespace

cudaError_t launch_on(cudaStream_t stream, dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  return submit(stream, [=, kernel = std::move(kernel)] {
    if (!fails_now()) launch(grid, block, shared_bytes, kernel);
  });
}

}  // namespace gptoss::emulator

using namespace gptoss::emulator;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return status(); }

// ------------------------------------------------------------------------------------------------------------ devices

cudaError_t cudaGetDeviceCount(int* n) {
  *n = static_cast<int>(setting("GPTOSS_EMULATOR_DEVICES", 1));
  return *n ? cudaSuccess : cudaErrorInsufficientDriver;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  int n = 0;
  if (cudaGetDeviceCount(&n) != cudaSuccess || device < 0 || device >= n) return cudaErrorInvalidDevice;
  const int capability = static_cast<int>(setting("GPTOSS_EMULATOR_SM", 80));
  *properties = {"host emulator", capability / 10, capability % 10, 4, 227u << 10};
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  int n = 0;
  if (cudaGetDeviceCount(&n) != cudaSuccess || device < 0 || device >= n) return cudaErrorInvalidDevice;
  current_device = device;
  return status();
}

cudaError_t cudaDeviceReset() {
  std::lock_guard lock(mutex);
  failure = cudaSuccess;
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------------------- memory

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  if (const cudaError_t error = status_outside_capture(); error != cudaSuccess) return error;
  std::lock_guard lock(mutex);
  const size_t size = (bytes + 255) / 256 * 256;
  *pointer = in_use + size <= setting("GPTOSS_EMULATOR_MEMORY", size_t{2} << 30) ? std::aligned_alloc(256, size) : nullptr;
  if (!*pointer) return cudaErrorMemoryAllocation;
  allocations[*pointer] = size;
  in_use += size;
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  const cudaError_t error = status_outside_capture();
  std::lock_guard lock(mutex);
  if (const auto found = allocations.find(pointer); found != allocations.end()) {
    in_use -= found->second;
    allocations.erase(found);
    std::free(pointer);
  }
  return error;
}

cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  if (const cudaError_t error = status_outside_capture(); error != cudaSuccess) return error;
  *pointer = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void* pointer) {
  std::free(pointer);
  return status_outside_capture();
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  std::lock_guard lock(mutex);
  *total = setting("GPTOSS_EMULATOR_MEMORY", size_t{2} << 30);
  *free = *total > in_use ? *total - in_use : 0;
  return failure;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return submit(stream, [=] { std::memcpy(to, from, bytes); });
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return submit(stream, [=] { std::memset(to, value, bytes); });
}

// -------------------------------------------------------------------------------------------------- streams and graphs

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new EmulatedStream;
  return status();
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return status();
}
cudaError_t cudaDeviceSynchronize() { return status_outside_capture(); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return status_outside_capture(); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = nullptr;
  return status();
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return status(); }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return status(); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return status_outside_capture(); }

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (!stream || stream->capture || capturing) return cudaErrorInvalidValue;
  if (const cudaError_t error = status(); error != cudaSuccess) return error;
  capturing = stream->capture = new EmulatedGraph;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  if (!stream->capture) return cudaErrorInvalidValue;
  capturing = nullptr;
  EmulatedGraph* captured = std::exchange(stream->capture, nullptr);
  if (captured->spoilt) {
    delete captured;
    return cudaErrorStreamCaptureInvalidated;
  }
  *graph = captured;
  return status();
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new EmulatedGraph(*graph);
  return status();
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  for (const auto& node : exec->nodes)
    if (const cudaError_t error = submit(stream, node); error != cudaSuccess) return error;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return status();
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return status();
}
