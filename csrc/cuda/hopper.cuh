// Instructions that only sm_90a has: barriers in shared memory that count bytes (mbarrier), copies of boxes by the copy engine
// (cp.async.bulk.tensor), products of a warpgroup (wgmma), registers handed from one warpgroup to another (setmaxnreg). On the
// card a line or two of PTX each; in the emulator, the same by their documentation (emulator/hopper.h).
//
// Shared memory is named by its 32-bit address in these.
#pragma once
#include "cuda/common.cuh"
#ifdef GPTOSS_CUDA_EMULATE
#include "cuda/emulator/hopper.h"
#else
#include <cuda.h>
#endif

namespace gptoss::cuda {

// ------------------------------------------------------------------------------------------------- boxes of a matrix

// A matrix of bfloat16 and the box of 64 columns (128 bytes) that one copy brings, 128-byte swizzled.
#ifdef GPTOSS_CUDA_EMULATE
using TensorMap = emulator::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

inline constexpr int kBoxColumns = 64;

// The driver's function is looked up by name: a module that names it would not load where there is no driver.
inline TensorMap make_tensor_map(const uint16_t* matrix, int64_t rows, int64_t stride, int box_rows) {
  TensorMap map;
#ifdef GPTOSS_CUDA_EMULATE
  map = emulator::make_tensor_map(matrix, rows, stride, box_rows, kBoxColumns);
#else
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
    CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    CHECK(found == cudaDriverEntryPointSuccess && function, "CUDA: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(stride), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * sizeof(uint16_t)};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<uint16_t*>(matrix), extents, strides,
                                 box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  CHECK(status == CUDA_SUCCESS, "CUDA: cuTensorMapEncodeTiled failed with ", static_cast<int>(status), " for ", rows, " x ",
        stride, " at ", static_cast<const void*>(matrix));
#endif
  return map;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
#ifdef GPTOSS_CUDA_EMULATE
  return emulator::shared_address(shared);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#endif
}

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
#ifndef GPTOSS_CUDA_EMULATE
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#else
  static_cast<void>(map);
#endif
}

// Starts the copy of the box whose first element is (row, column) to shared memory, a multiple of 1024; the barrier counts its
// bytes. What is outside the matrix becomes 0 and counts too.
__device__ __forceinline__ void load_box(uint32_t to, const TensorMap* map, int column, int row, uint32_t barrier) {
#ifdef GPTOSS_CUDA_EMULATE
  emulator::load_box(to, *map, column, row, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
#endif
}

// What ordinary stores wrote to device memory, and this thread may read, the copy engine may read after this.
__device__ __forceinline__ void let_copies_read_global() {
#ifndef GPTOSS_CUDA_EMULATE
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

// An error of the launch.
__device__ __forceinline__ void stop_kernel() {
#ifndef GPTOSS_CUDA_EMULATE
  __trap();
#endif
}

// ----------------------------------------------------------------------------------------------------------- barriers

inline constexpr int kBarrierBytes = 8;

// A phase of the barrier ends with its last arrival and its last expected byte; then the next begins. The first has parity 0.
__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
#ifdef GPTOSS_CUDA_EMULATE
  emulator::init_barrier(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}
// By the thread that initialised them, before the block's barrier: the copy engine sees them as well.
__device__ __forceinline__ void publish_barriers() {
#ifndef GPTOSS_CUDA_EMULATE
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
#ifdef GPTOSS_CUDA_EMULATE
  emulator::arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}
// Arrives, and the phase waits for so many bytes of copies more.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
#ifdef GPTOSS_CUDA_EMULATE
  emulator::arrive(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
// Until the phase of that parity has ended; the phase before the first counts as ended.
__device__ __forceinline__ void wait_phase(uint32_t barrier, uint32_t parity) {
#ifdef GPTOSS_CUDA_EMULATE
  emulator::wait_phase(barrier, parity);
#else
  uint32_t ended;
  do {
    asm volatile(
        "{\n .reg .pred ended;\n mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!ended);
#endif
}

// --------------------------------------------------------------------------------------------------------- warpgroups

// A warpgroup (4 warps, the first a multiple of 4) changes how many registers each of its threads has. All of it calls this,
// in a kernel with __launch_bounds__(threads, 1).
template <int n>
__device__ __forceinline__ void shrink_registers() {
#ifndef GPTOSS_CUDA_EMULATE
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
#endif
}
template <int n>
__device__ __forceinline__ void grow_registers() {
#ifndef GPTOSS_CUDA_EMULATE
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
#endif
}

// A value that all lanes of the warp have, told to the compiler: around wgmma it takes no branch that lanes could part at.
__device__ __forceinline__ int same(int value) { return __shfl_sync(kAllLanes, value, 0); }

// The descriptor of the B operand that is inputs 16 i .. 16 i + 15 of 64, of any number of tokens that load_box put at this
// address (PTX ISA, "Matrix descriptor"): tokens are 128 bytes apart, groups of 8 are 1024 apart, 128-byte swizzle.
__device__ __forceinline__ uint64_t operand_b(uint32_t address, int i) {
  constexpr uint32_t kLeading = 1u << 16, kStride = 1024 >> 4, kSwizzle128 = 1u << 30;
  return ((address >> 4) + 2 * i + kLeading) | static_cast<uint64_t>(kStride | kSwizzle128) << 32;
}

// Before the first wgmma that uses registers written by anything else: sums set to zero, fragments that were decoded.
__device__ __forceinline__ void wgmma_fence() {
#ifdef GPTOSS_CUDA_EMULATE
  emulator::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
// The products since the last commit are a group.
__device__ __forceinline__ void wgmma_commit() {
#ifdef GPTOSS_CUDA_EMULATE
  emulator::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until at most n of the newest groups run. Before that neither their sums may be touched nor their fragments written, nor
// the shared memory that they read.
template <int n>
__device__ __forceinline__ void wgmma_wait() {
#ifdef GPTOSS_CUDA_EMULATE
  emulator::wgmma_wait(n);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
#endif
}
// The compiler may not take these sums from before this point.
template <int n>
__device__ __forceinline__ void settle(float (&sums)[n]) {
#ifndef GPTOSS_CUDA_EMULATE
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(sums[i])::"memory");
#else
  static_cast<void>(sums);
#endif
}

// d += A B of a warpgroup: A [64, 16] from registers, B [16, kN] from shared memory. Fragments of warp w, lane 4g + c (PTX ISA,
// "Register Fragments for wgmma.mma_async.m64nNk16"): those of mma.m16n8k16 for rows 16w.. (common.cuh); d[4t .. 4t+3] are
// columns 8t.. of it.
template <int kN, int kSums>
__device__ __forceinline__ void wgmma(float (&d)[kSums], const uint32_t (&a)[4], uint64_t b) {
  static_assert((kN == 32 || kN == 64 || kN == 96 || kN == 128) && kSums >= kN / 2);
#ifdef GPTOSS_CUDA_EMULATE
  emulator::wgmma(d, kN, a, b);
#else
#define SUMS_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
#define NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 "
  // After B's descriptor: the sums are added to, A and B as they are (1, 1, 1), B not transposed (0).
  if constexpr (kN == 32) {
    asm volatile(WGMMA(32) "{" NAMES_0 "}, {%16, %17, %18, %19}, %20, 1, 1, 1, 0;" : SUMS_16(0) : OPERANDS);
  } else if constexpr (kN == 64) {
    asm volatile(WGMMA(64) "{" NAMES_0 ", " NAMES_16 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
                 : SUMS_16(0), SUMS_16(16)
                 : OPERANDS);
  } else if constexpr (kN == 96) {
    asm volatile(WGMMA(96) "{" NAMES_0 ", " NAMES_16 ", " NAMES_32 "}, {%48, %49, %50, %51}, %52, 1, 1, 1, 0;"
                 : SUMS_16(0), SUMS_16(16), SUMS_16(32)
                 : OPERANDS);
  } else {
    asm volatile(WGMMA(128) "{" NAMES_0 ", " NAMES_16 ", " NAMES_32 ", " NAMES_48 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                 : SUMS_16(0), SUMS_16(16), SUMS_16(32), SUMS_16(48)
                 : OPERANDS);
  }
#undef WGMMA
#undef NAMES_48
#undef NAMES_32
#undef NAMES_16
#undef NAMES_0
#undef OPERANDS
#undef SUMS_16
#undef SUMS_8
#endif
}

}  // namespace gptoss::cuda
