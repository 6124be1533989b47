// The emulator's barriers, box copies and warpgroup products are those of the PTX ISA, and catch what they are there to catch.
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/hopper.cuh"
#include "emulator_checks.h"

namespace gptoss::cuda {
namespace {

constexpr int kThreads = 128, kRows = 40, kColumns = 128;  // of the matrix

// Shared memory from a multiple of 1024 on, and a barrier behind `bytes` of it.
struct Shared {
  unsigned char* data;
  uint32_t address, barrier;
};
Shared make_shared(int bytes, int arrivals) {
  auto* data = shared_memory<unsigned char>();
  data += (1024 - shared_address(data) % 1024) % 1024;
  const Shared shared{data, shared_address(data), shared_address(data) + bytes};
  if (threadIdx.x == 0) init_barrier(shared.barrier, arrivals);
  __syncthreads();
  return shared;
}

// --- boxes ------------------------------------------------------------------------------------------------------------
void copy_kernel(TensorMap map, int column, int row, uint16_t* early, uint16_t* out) {
  wait_for_previous();
  const Shared shared = make_shared(4096, 1);
  const int i = static_cast<int>(threadIdx.x);
  if (i == 0) {
    arrive_expecting(shared.barrier, 4096);
    load_box(shared.address, &map, column, row, shared.barrier);
  }
  __syncthreads();
  const auto* values = reinterpret_cast<const uint16_t*>(shared.data);
  for (int v = i; v < 2048; v += kThreads) early[v] = values[v];
  __syncthreads();
  wait_phase(shared.barrier, 0);
  for (int v = i; v < 2048; v += kThreads) out[v] = values[v];
}

void test_boxes() {
  std::vector<uint16_t> matrix(kRows * kColumns), early(2048), out(2048);
  for (size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<uint16_t>(i + 1);
  const TensorMap map = make_tensor_map(matrix.data(), kRows, kColumns, 32);
  for (int column : {0, 64})
    for (int row : {0, 8, 32}) {
      launch({dim3(1), dim3(kThreads), 8192}, copy_kernel, map, column, row, early.data(), out.data());
      for (int r = 0; r < 32; ++r)
        for (int c = 0; c < 64; ++c) {
          // Chunks of 16 bytes change places within a line of 128, by the line's number.
          const int at = r * 64 + ((c / 8) ^ (r % 8)) * 8 + c % 8;
          const int expected = row + r < kRows ? (row + r) * kColumns + column + c + 1 : 0;
          CHECK(out[at] == expected, "row ", r, ", column ", c, " is ", out[at], ", not ", expected);
          CHECK(early[at] == 0xffff, "a box came before it was waited for");
        }
    }
}

// --- barriers ---------------------------------------------------------------------------------------------------------
// Two warps pass a number to and fro through one place.
void ping_pong_kernel(int* out) {
  wait_for_previous();
  auto* shared = shared_memory<unsigned char>();
  const uint32_t full = shared_address(shared) + 64, empty = full + 8;
  int* place = reinterpret_cast<int*>(shared);
  if (threadIdx.x == 0) {
    init_barrier(full, 32);
    init_barrier(empty, 1);
  }
  __syncthreads();
  for (int i = 0; i < 5; ++i) {
    if (threadIdx.x < 32) {
      wait_phase(empty, i % 2 ^ 1);
      if (threadIdx.x == 0) *place = 100 + i;
      arrive(full);
    } else {
      wait_phase(full, i % 2);
      if (threadIdx.x == 32) out[i] = *place;
      __syncwarp();
      if (threadIdx.x == 32) arrive(empty);
    }
  }
}

void never_ends_kernel() {
  wait_for_previous();
  const Shared shared = make_shared(0, 2);
  if (threadIdx.x == 0) arrive(shared.barrier);
  wait_phase(shared.barrier, 0);
}
void forgotten_bytes_kernel() {
  wait_for_previous();
  const Shared shared = make_shared(0, 1);
  if (threadIdx.x == 0) arrive_expecting(shared.barrier, 16);
  wait_phase(shared.barrier, 0);
}
void unaligned_kernel(TensorMap map) {
  wait_for_previous();
  const Shared shared = make_shared(8192, 1);
  if (threadIdx.x == 0) load_box(shared.address + 512, &map, 0, 0, shared.barrier);
}
void forgotten_box_kernel(TensorMap map) {
  wait_for_previous();
  const Shared shared = make_shared(4096, 1);
  if (threadIdx.x == 0) load_box(shared.address, &map, 0, 0, shared.barrier);
}

void test_barriers() {
  std::vector<int> out(5);
  launch({dim3(1), dim3(64), 128}, ping_pong_kernel, out.data());
  for (int i = 0; i < 5; ++i) CHECK(out[i] == 100 + i, "turn ", i, " has ", out[i]);
  std::vector<uint16_t> matrix(kRows * kColumns);
  const TensorMap map = make_tensor_map(matrix.data(), kRows, kColumns, 32);
  const Launch l{dim3(1), dim3(kThreads), 16384};
  expect_error("never ends", [&] { launch(l, never_ends_kernel); });
  expect_error("never ends", [&] { launch(l, forgotten_bytes_kernel); });
  expect_error("not a multiple of 1024", [&] { launch(l, unaligned_kernel, map); });
  expect_error("a copy that nobody waits for", [&] { launch(l, forgotten_box_kernel, map); });
}

// --- products ---------------------------------------------------------------------------------------------------------
enum class Mistake { kNone, kNoWait, kNoFence, kNoCommit, kWrittenFragment, kDescriptor, kLeftOut };

// c [64, kN] += a [64, 64] b [kN, 64]. Fragments by the formulas of the PTX ISA ("Register Fragments for
// wgmma.mma_async.m64nNk16"), apart from the emulator's own: a warp has 16 rows.
template <int kN>
void product_kernel(TensorMap map, const uint16_t* a, float* c, Mistake mistake) {
  wait_for_previous();
  const Shared shared = make_shared(kN * 128, 1);
  if (threadIdx.x == 0) {
    arrive_expecting(shared.barrier, kN * 128);
    for (int box = 0; box < kN / 32; ++box) load_box(shared.address + box * 4096, &map, 0, box * 32, shared.barrier);
  }
  wait_phase(shared.barrier, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32, first = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
  const auto at = [&](int i) { return (first + i / 2 % 2 * 8) * kN + i / 4 * 8 + lane % 4 * 2 + i % 2; };
  uint32_t fragments[4][4];
  for (int s = 0; s < 4; ++s)
    for (int r = 0; r < 4; ++r) {
      const uint16_t* pair = a + (first + r % 2 * 8) * 64 + s * 16 + lane % 4 * 2 + r / 2 * 8;
      fragments[s][r] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  float acc[kN / 2];
  for (int i = 0; i < kN / 2; ++i) acc[i] = c[at(i)];
  if (mistake != Mistake::kNoFence) wgmma_fence();
  for (int s = 0; s < 4; ++s) {
    if (mistake == Mistake::kLeftOut && s == 2 && threadIdx.x >= 96) continue;
    const uint64_t b = operand_b(shared.address, s);
    wgmma<kN>(acc, fragments[s], mistake == Mistake::kDescriptor ? b & ~(uint64_t{3} << 62) : b);
  }
  if (mistake != Mistake::kNoCommit) wgmma_commit();
  if (mistake == Mistake::kWrittenFragment) fragments[3][0] ^= 0x8000;
  if (mistake == Mistake::kNoWait)
    for (int i = 0; i < kN / 2; ++i) c[at(i)] = acc[i];
  wgmma_wait<0>();
  if (mistake != Mistake::kNoWait)
    for (int i = 0; i < kN / 2; ++i) c[at(i)] = acc[i];
}

template <int kN>
void test_products() {
  std::mt19937 random(kN);
  std::vector<uint16_t> a(64 * 64), b(kN * 64);
  std::vector<float> c(64 * kN), expected(64 * kN);
  const auto small = [&] { return static_cast<float>(static_cast<int>(random() % 17) - 8); };  // sums are exact
  for (uint16_t& v : a) v = static_cast<uint16_t>(pack_bf16(small(), 0));
  for (uint16_t& v : b) v = static_cast<uint16_t>(pack_bf16(small(), 0));
  for (float& v : c) v = small();
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < kN; ++n) {
      expected[m * kN + n] = c[m * kN + n];
      for (int k = 0; k < 64; ++k) expected[m * kN + n] += bf16_low(a[m * 64 + k]) * bf16_low(b[n * 64 + k]);
    }
  const TensorMap map = make_tensor_map(b.data(), kN, 64, 32);
  const auto run = [&](Mistake mistake) {
    std::vector<float> out = c;
    launch({dim3(1), dim3(kThreads), kN * 128 + 2048}, product_kernel<kN>, map, static_cast<const uint16_t*>(a.data()),
           out.data(), mistake);
    return out;
  };
  CHECK(run(Mistake::kNone) == expected, "the product of ", kN, " tokens is wrong");
  for (float value : run(Mistake::kNoWait)) CHECK(value != value, "sums were there before they were waited for: ", value);
  CHECK(run(Mistake::kWrittenFragment) != expected, "a fragment that was written too early went unseen");
  expect_error("without a fence", [&] { run(Mistake::kNoFence); });
  expect_error("nobody waits for", [&] { run(Mistake::kNoCommit); });
  expect_error("not 128-byte swizzled", [&] { run(Mistake::kDescriptor); });
  expect_error("different products", [&] { run(Mistake::kLeftOut); });
}

// Two groups of products on the same sums, the second one still running when the first has been waited for.
void two_groups_kernel(TensorMap map, float* between, float* after) {
  wait_for_previous();
  const Shared shared = make_shared(4096, 1);
  if (threadIdx.x == 0) {
    arrive_expecting(shared.barrier, 4096);
    load_box(shared.address, &map, 0, 0, shared.barrier);
  }
  wait_phase(shared.barrier, 0);
  const uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
  float acc[16] = {};
  for (int group = 0; group < 2; ++group) {
    wgmma_fence();
    wgmma<32>(acc, ones, operand_b(shared.address, 0));
    wgmma_commit();
  }
  wgmma_wait<1>();
  between[threadIdx.x] = acc[0];
  wgmma_wait<0>();
  after[threadIdx.x] = acc[0];
}

void test_groups() {
  const std::vector<uint16_t> b(32 * 64, 0x3f80);
  std::vector<float> between(kThreads), after(kThreads);
  launch({dim3(1), dim3(kThreads), 8192}, two_groups_kernel, make_tensor_map(b.data(), 32, 64, 32), between.data(),
         after.data());
  for (float value : between) CHECK(value != value, "sums of a group that still runs were there: ", value);
  for (float value : after) CHECK(value == 32, "two products have ", value);
}

}  // namespace
}  // namespace gptoss::cuda

int main() {
  using namespace gptoss::cuda;
  try {
    for (int seed = 0; seed < 5; ++seed) {
      set_seed(seed);
      test_boxes();
      test_barriers();
      test_products<32>();
      test_products<64>();
      test_products<96>();
      test_products<128>();
      test_groups();
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "test_emulator_hopper: %s\n", error.what());
    return 1;
  }
  std::puts("test_emulator_hopper: all passed");
}
