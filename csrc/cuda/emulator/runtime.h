// The part of the CUDA runtime that gptoss calls, on the host: memory, streams, graphs, failures. Kernels are in emulator.h.
//
// A stream runs what it is given at once, so stream order holds and events need no state. While a thread captures a stream,
// what goes to it is kept instead, kernels with their arguments by value, and done when the graph is launched. What waits for
// the card or takes memory then is refused with the documented error, and the capture is spoilt.
//
// The card is what the environment says, looked up at every call:
//   GPTOSS_EMULATOR_MEMORY   its bytes (2 GiB). What is allocated counts
//   GPTOSS_EMULATOR_SM       its compute capability times ten (80)
//   GPTOSS_EMULATOR_DEVICES  how many there are (1), all in the same memory; 0: a machine without a driver
//   GPTOSS_EMULATOR_FAIL     N: the Nth kernel from when this is set fails, and then every call does, until cudaDeviceReset
#pragma once
#include <cstddef>
#include <functional>

#include "cuda/emulator/emulator.h"

using cudaError_t = int;
using cudaStream_t = struct EmulatedStream*;
using cudaEvent_t = struct EmulatedEvent*;
using cudaGraph_t = struct EmulatedGraph*;
using cudaGraphExec_t = struct EmulatedGraph*;
inline constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2,
                             cudaErrorInsufficientDriver = 35, cudaErrorInvalidDevice = 101, cudaErrorIllegalAddress = 700,
                             cudaErrorStreamCaptureUnsupported = 900, cudaErrorStreamCaptureInvalidated = 901;
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
struct cudaDeviceProp {
  char name[64];
  int major, minor, multiProcessorCount;
  size_t sharedMemPerBlockOptin;
};
inline constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;

#define __CUDA_ARCH_LIST__ 800, 900, 1200

namespace gptoss::emulator {
// A launch on a stream, as cudaLaunchKernelEx: now, or kept by the capture.
cudaError_t launch_on(cudaStream_t stream, dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel);
}  // namespace gptoss::emulator

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();

cudaError_t cudaGetDeviceCount(int* n);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceReset();  // ends a failure; memory is given back by its owners

cudaError_t cudaMalloc(void** pointer, size_t bytes);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaMallocHost(void** pointer, size_t bytes);
cudaError_t cudaFreeHost(void* pointer);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
