// A host stand-in for the part of the CUDA runtime that gptoss uses, so that the kernel sources compile with the C++ compiler
// and run where there is no GPU.
//
// A launch runs its blocks one after the other, in an order shuffled by a seed. The threads of a block are fibers on small
// stacks, kept in a pool: one runs until it comes to a barrier or a warp collective and waits there for the others. Which
// thread goes first is shuffled too (GPTOSS_EMULATOR_SEED; 0 is the plain order): a result that changes with the seed is a
// race. What is checked or provoked:
//   - a barrier or collective that not all threads reach is an error that says which block and how many threads;
//   - shared memory is a heap block of the size asked for and starts as NaN (all bits set), before every block;
//   - a kernel with a thread that never waits for the kernel before it (wait_for_previous) is an error;
//   - device allocations are separate heap blocks, so AddressSanitizer sees an access out of bounds;
//   - asynchronous copies to shared memory happen as late as they may: when they are waited for.
// Only what the kernels use is here: warp collectives of all 32 lanes, blocks of whole warps. The runtime is in runtime.h.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace gptoss::emulator {

// What the running thread sees.
struct Place {
  dim3 thread, block, block_size, grid_size;
};
extern Place place;

// --- threads of a block ---------------------------------------------------------------------------------------------
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);  // throws on a lost thread
unsigned char* shared_memory();
void barrier();
void wait_for_previous();  // on the card, until the kernel before this one has ended

// For the other parts of the emulator: the running thread goes on when the counter has changed; gives up the block.
void wait_for_change(const uint32_t& counter);
void stop_block(const char* error);

// All 32 lanes of the calling warp hand over a pointer; the last to come runs combine(lanes), then all go on.
using Combine = void (*)(void* const* lanes);
void collective(void* mine, Combine combine);

// --- asynchronous copies --------------------------------------------------------------------------------------------
void copy_async(void* shared, const void* global, int bytes);  // 16 bytes of shared memory; those past `bytes` become 0
void commit_copies();
void wait_copies(int groups_left);

inline int lane() { return static_cast<int>(place.thread.x % 32); }

}  // namespace gptoss::emulator

#define threadIdx (::gptoss::emulator::place.thread)
#define blockIdx (::gptoss::emulator::place.block)
#define blockDim (::gptoss::emulator::place.block_size)
#define gridDim (::gptoss::emulator::place.grid_size)

inline void __syncthreads() { gptoss::emulator::barrier(); }
inline void __syncwarp() {
  gptoss::emulator::collective(nullptr, [](void* const*) {});
}

namespace gptoss::emulator {

template <class T>
struct Exchange {
  T value;
  int source;
  T result;
};

template <class T>
T exchange(T value, int source) {
  Exchange<T> mine{value, source, T{}};
  collective(&mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto* lane = static_cast<Exchange<T>*>(lanes[i]);
      lane->result = static_cast<Exchange<T>*>(lanes[lane->source & 31])->value;
    }
  });
  return mine.result;
}

}  // namespace gptoss::emulator

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return gptoss::emulator::exchange(value, source);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return gptoss::emulator::exchange(value, gptoss::emulator::lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = gptoss::emulator::lane();
  return gptoss::emulator::exchange(value, lane < delta ? lane : lane - delta);
}
unsigned __ballot_sync(unsigned, int predicate);
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
template <class T>
T atomicAdd(T* address, T value) {
  return std::exchange(*address, *address + value);
}
inline unsigned atomicInc(unsigned* address, unsigned last) {  // back to 0 after `last`
  return std::exchange(*address, *address >= last ? 0 : *address + 1);
}
inline void __threadfence() {}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
