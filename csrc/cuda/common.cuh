// What every kernel stands on: launches, shared memory, and the instructions that CUDA C++ has no function for. On the card
// these are a line of PTX each; in the emulator, the same by the documented layout of fragments.
//
// Fragments of mma.sync.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"), of lane 4g + c:
//   A [16, 16]: a0 (g, 2c..2c+1)  a1 (g + 8, 2c..)  a2 (g, 2c + 8..)  a3 (g + 8, 2c + 8..)
//   B [16, 8]:  b0 (2c..2c+1, g)  b1 (2c + 8.., g)          C [16, 8]: c0, c1 (g, 2c..2c+1)  c2, c3 (g + 8, 2c..)
// Both operands here number the inputs of a block of 32 so that lane c owns 8c .. 8c+7, 16 bytes of bfloat16: product j of a
// block's two takes 8c + 4j .. +3. A sum does not mind in which order both operands list its terms.
#pragma once
#ifdef GPTOSS_CUDA_EMULATE
#include "cuda/emulator/runtime.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

#include "check.h"

namespace gptoss::cuda {

// Throws with the call's name and the error; notes it where the card is unusable from now on (failures.cu).
[[noreturn]] void call_failed(const char* call, cudaError_t status);

#define CUDA_CHECK(call)                                                     \
  do {                                                                       \
    const cudaError_t status_ = (call);                                      \
    if (status_ != cudaSuccess) ::gptoss::cuda::call_failed(#call, status_); \
  } while (0)

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ------------------------------------------------------------------------------------------------------------ launches

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

// Whether the current card starts a kernel while the one before it still runs (programmatic dependent launch, sm_90 and up).
inline bool overlaps_launches() {
#ifdef GPTOSS_CUDA_EMULATE
  return true;
#else
  int device = 0, major = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major >= 9;
#endif
}

// Every kernel starts here, and every thread of every kernel calls wait_for_previous() before it touches what another kernel
// writes: the kernel before it on the stream may still be running.
template <class... Parameters, class... Arguments>
void launch(const Launch& l, void (*kernel)(Parameters...), Arguments... arguments) {
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0) return;
#ifdef GPTOSS_CUDA_EMULATE
  const cudaError_t status = emulator::launch_on(l.stream, l.grid, l.block, l.shared_bytes, [=] { kernel(arguments...); });
#else
  if (l.shared_bytes > 48 << 10) {
    // All that the card allows, not what this launch wants: the limit is the kernel's, and another thread's launch of it may
    // want more at the same time.
    int device = 0, most = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = l.grid;
  config.blockDim = l.block;
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = l.stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = overlaps_launches() ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#endif
  if (status != cudaSuccess) call_failed("cudaLaunchKernelEx", status);
}

// Until all kernels before this one have ended and what they wrote can be read. What no kernel writes during a step (weights,
// tables) may be read, or prefetched, before.
__device__ __forceinline__ void wait_for_previous() {
#ifdef GPTOSS_CUDA_EMULATE
  emulator::wait_for_previous();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may be started from now on, as far as this block is concerned; it still waits for the end of this one.
__device__ __forceinline__ void let_next_start() {
#if !defined(GPTOSS_CUDA_EMULATE) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The block's shared memory, as many bytes as the launch asked for.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef GPTOSS_CUDA_EMULATE
  return reinterpret_cast<T*>(emulator::shared_memory());
#else
  extern __shared__ __align__(128) unsigned char gptoss_shared[];
  return reinterpret_cast<T*>(gptoss_shared);
#endif
}

// -------------------------------------------------------------------------------------------------------- instructions

// Two floats rounded to nearest even, the first in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#ifdef GPTOSS_CUDA_EMULATE
  const auto round = [](float value) -> uint32_t {
    const uint32_t bits = __float_as_uint(value);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
#else
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}

__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Both bfloat16 halves of each operand multiplied.
__device__ __forceinline__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
#ifdef GPTOSS_CUDA_EMULATE
  return pack_bf16(bf16_low(a) * bf16_low(b), bf16_high(a) * bf16_high(b));
#else
  uint32_t product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
#endif
}

struct FragmentA {
  uint32_t a0, a1, a2, a3;
};
struct FragmentB {
  uint32_t b0, b1;
};
struct FragmentC {
  float v[4];
};

// c += A B. Columns do not mix: an output depends on its own column of B and on nothing else in it.
__device__ __forceinline__ void mma(FragmentC& c, FragmentA a, FragmentB b) {
#ifdef GPTOSS_CUDA_EMULATE
  struct Lane {
    FragmentC* c;
    FragmentA a;
    FragmentB b;
  } mine{&c, a, b};
  emulator::collective(&mine, [](void* const* lanes) {
    float A[16][16], B[8][16];
    for (int i = 0; i < 32; ++i) {
      const Lane& lane = *static_cast<Lane*>(lanes[i]);
      const int g = i / 4, k = i % 4 * 2;
      const uint32_t as[] = {lane.a.a0, lane.a.a1, lane.a.a2, lane.a.a3}, bs[] = {lane.b.b0, lane.b.b1};
      for (int r = 0; r < 4; ++r) {
        float* to = &A[g + r % 2 * 8][k + r / 2 * 8];
        to[0] = bf16_low(as[r]), to[1] = bf16_high(as[r]);
      }
      for (int r = 0; r < 2; ++r) B[g][k + r * 8] = bf16_low(bs[r]), B[g][k + r * 8 + 1] = bf16_high(bs[r]);
    }
    for (int i = 0; i < 32; ++i) {
      FragmentC& out = *static_cast<Lane*>(lanes[i])->c;
      for (int r = 0; r < 4; ++r) {
        const float *row = A[i / 4 + r / 2 * 8], *column = B[i % 4 * 2 + r % 2];
        float part[4] = {};
        for (int k = 0; k < 16; k += 4)
          for (int j = 0; j < 4; ++j) part[j] += row[k + j] * column[k + j];
        out.v[r] += (part[0] + part[1]) + (part[2] + part[3]);
      }
    }
  });
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
      : "r"(a.a0), "r"(a.a1), "r"(a.a2), "r"(a.a3), "r"(b.b0), "r"(b.b1));
#endif
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory, into the words of a fragment: lane i hands over the address of row
// i % 8 of matrix i / 8, 16 bytes; lane 4g + c gets of each matrix row g, columns 2c and 2c + 1, or, where they are to be
// transposed, column g, rows 2c and 2c + 1. As A [16, 16] its matrices are the upper left, lower left, upper right, lower
// right.
template <bool kTransposed>
__device__ __forceinline__ FragmentA ldmatrix(const void* row) {
  FragmentA d;
#ifdef GPTOSS_CUDA_EMULATE
  struct Lane {
    const uint16_t* row;
    FragmentA* d;
  } mine{static_cast<const uint16_t*>(row), &d};
  emulator::collective(&mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      const int g = i / 4, k = i % 4 * 2;
      uint32_t words[4];
      for (int m = 0; m < 4; ++m) {
        const auto at = [&](int r, int column) -> uint32_t { return static_cast<Lane*>(lanes[8 * m + r])->row[column]; };
        words[m] = kTransposed ? at(k, g) | at(k + 1, g) << 16 : at(g, k) | at(g, k + 1) << 16;
      }
      *static_cast<Lane*>(lanes[i])->d = {words[0], words[1], words[2], words[3]};
    }
  });
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d.a0), "=r"(d.a1), "=r"(d.a2), "=r"(d.a3)
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d.a0), "=r"(d.a1), "=r"(d.a2), "=r"(d.a3)
                 : "r"(address)
                 : "memory");
#endif
  return d;
}

// An 8 x 8 matrix of 16-bit numbers, transposed: lane 4g + c has row g, columns 2c and 2c + 1 of it, before and after.
__device__ __forceinline__ uint32_t movmatrix(uint32_t pair) {
#ifdef GPTOSS_CUDA_EMULATE
  struct Lane {
    uint32_t pair, result;
  } mine{pair, 0};
  emulator::collective(&mine, [](void* const* lanes) {
    const auto at = [&](int r, int column) {
      return static_cast<Lane*>(lanes[4 * r + column / 2])->pair >> column % 2 * 16 & 0xffffu;
    };
    for (int i = 0; i < 32; ++i) static_cast<Lane*>(lanes[i])->result = at(i % 4 * 2, i / 4) | at(i % 4 * 2 + 1, i / 4) << 16;
  });
  return mine.result;
#else
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
#endif
}

// 2^x to about 22 bits, 0 where that is below the normal numbers.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef GPTOSS_CUDA_EMULATE
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Starts a copy of 16 bytes to shared memory; `bytes` (0 or 16) are read, the rest become zero.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
#ifdef GPTOSS_CUDA_EMULATE
  emulator::copy_async(shared, global, bytes);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void commit_copies() {
#ifdef GPTOSS_CUDA_EMULATE
  emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most n of this thread's newest groups are still on their way. Others see the copies after a barrier.
template <int n>
__device__ __forceinline__ void wait_copies() {
#ifdef GPTOSS_CUDA_EMULATE
  emulator::wait_copies(n);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

// 16 bytes that are read once: past the first-level cache.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
#ifdef GPTOSS_CUDA_EMULATE
  return *address;
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
#endif
}

// Starts bringing what is there from memory to the second-level cache.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* address) {
#ifndef GPTOSS_CUDA_EMULATE
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// -------------------------------------------------------------------------------------------------- blocks that finish

// Counts the calling thread among n that come to this counter; whether it is the last. What each of them wrote before it came,
// and what its block wrote before a barrier that it passed, can be read by the last, and after another barrier by its block.
// The counter starts at 0 and is 0 again after the last. Only after wait_for_previous(), as any other memory.
__device__ __forceinline__ bool comes_last(unsigned* counter, unsigned n) {
  __threadfence();
  const bool last = atomicInc(counter, n - 1) == n - 1;
  __threadfence();
  return last;
}

// What another block of the same kernel has written, before a __threadfence() that this block has seen: from the second-level
// cache, which all blocks share.
template <class T>
__device__ __forceinline__ T load_fresh(const T* address) {
#ifdef GPTOSS_CUDA_EMULATE
  return *address;
#else
  return __ldcg(address);
#endif
}

// ---------------------------------------------------------------------------------------------------------- reductions

__device__ __forceinline__ float warp_sum(float value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}

}  // namespace gptoss::cuda
