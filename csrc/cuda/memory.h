// Owners of device and pinned memory, and the way of a weight onto the card.
#pragma once
#include <cstring>

#include "cuda/common.cuh"
#include "tensor.h"

namespace gptoss::cuda {

inline Buffer device_memory(size_t bytes) {
  if (bytes == 0) return {};
  void* data = nullptr;
  if (const cudaError_t status = cudaMalloc(&data, bytes); status != cudaSuccess) {
    cudaGetLastError();  // not the next call's failure
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    FAIL("cannot allocate ", bytes, " bytes of GPU memory (", free, " of ", total, " are free): ", cudaGetErrorString(status));
  }
  return Buffer(data, bytes, [](void* memory, size_t) { cudaFree(memory); });
}

inline Buffer pinned_memory(size_t bytes) {
  void* data = nullptr;
  CUDA_CHECK(cudaMallocHost(&data, bytes));
  return Buffer(data, bytes, [](void* memory, size_t) { cudaFreeHost(memory); });
}

class Event {
 public:
  Event() { CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) { CUDA_CHECK(cudaEventRecord(event_, stream)); }
  void wait() { CUDA_CHECK(cudaEventSynchronize(event_)); }

 private:
  cudaEvent_t event_ = nullptr;
};

class Stream {
 public:
  Stream() { CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }
  void wait() const { CUDA_CHECK(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
};

// Two pinned buffers and two device buffers, used in turn: while one part of a tensor is arranged on the card, the next is
// copied. What is on the card twice at any time is two parts, not a weight.
class Stage {
 public:
  static constexpr size_t kBytes = 8 << 20;

  // use(device) starts the work that reads the copied part.
  template <class Use>
  void send(const void* host, size_t bytes, cudaStream_t stream, const Use& use) {
    Slot& slot = slots_[turn_ ^= 1];
    slot.done.wait();
    if (slot.device.bytes() < bytes) {
      slot.pinned = pinned_memory(std::max(bytes, kBytes));
      slot.device = device_memory(std::max(bytes, kBytes));
    }
    std::memcpy(slot.pinned.data(), host, bytes);
    CUDA_CHECK(cudaMemcpyAsync(slot.device.data(), slot.pinned.data(), bytes, cudaMemcpyHostToDevice, stream));
    use(slot.device.data());
    slot.done.record(stream);
  }

 private:
  struct Slot {
    Buffer pinned, device;
    Event done;  // the part has been used
  };
  Slot slots_[2];
  int turn_ = 0;
};

}  // namespace gptoss::cuda
