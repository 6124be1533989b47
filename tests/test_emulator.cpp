// The emulator does what it says: collectives and fragments by their documentation, and it catches what it is there to catch.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/common.cuh"

namespace gptoss::cuda {
namespace {

void set_seed(int seed) { setenv("GPTOSS_EMULATOR_SEED", std::to_string(seed).c_str(), 1); }

void warp_votes_kernel(int* out) {
  wait_for_previous();
  const int i = static_cast<int>(threadIdx.x);
  out[i] = __shfl_xor_sync(kAllLanes, i, 5) * 1000 + __shfl_sync(kAllLanes, i, 3);
  if (__ballot_sync(kAllLanes, i % 3 == 0) != 0x49249249u || __any_sync(kAllLanes, i > 31)) out[i] = -1;
}

void test_collectives() {
  std::array<int, 32> out;
  launch({dim3(1), dim3(32)}, warp_votes_kernel, out.data());
  for (int i = 0; i < 32; ++i) CHECK(out[i] == (i ^ 5) * 1000 + 3, "lane ", i, " has ", out[i]);
}

void sum_kernel(float* out) {
  wait_for_previous();
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  float sum = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) sum += shared[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum + static_cast<float>(blockIdx.x);
}

void test_barrier() {
  std::vector<float> out(4 * 96);
  launch({dim3(4), dim3(96), 96 * 4}, sum_kernel, out.data());
  for (int i = 0; i < 4 * 96; ++i) CHECK(out[i] == 96 * 95 / 2 + i / 96, "thread ", i, " has ", out[i]);
}

void unequal_barrier_kernel() {
  wait_for_previous();
  if (threadIdx.x < 40) __syncthreads();
}
void unequal_collective_kernel() {
  wait_for_previous();
  if (threadIdx.x != 7) __syncwarp();
}
void different_collectives_kernel(int* out) {
  wait_for_previous();
  *out = threadIdx.x < 16 ? __shfl_xor_sync(kAllLanes, 1, 1) : __any_sync(kAllLanes, 1);
}

template <class Run>
void expect_error(const char* what, const Run& run) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    CHECK(std::string(error.what()).find(what) != std::string::npos, "another error: ", error.what());
    return;
  }
  CHECK(false, "no error: ", what);
}

void impatient_kernel() {
  if (threadIdx.x != 3) wait_for_previous();
}

void test_lost_threads() {
  expect_error("0, 0), 40 of 64 threads wait, 24 have returned", [] { launch({dim3(2), dim3(64)}, unequal_barrier_kernel); });
  expect_error("31 of 32 threads wait", [] { launch({dim3(1), dim3(32)}, unequal_collective_kernel); });
  expect_error("never waits for the kernel before it", [] { launch({dim3(1), dim3(32)}, impatient_kernel); });
  int out = 0;
  expect_error("two different", [&] { launch({dim3(1), dim3(32)}, different_collectives_kernel, &out); });
  test_barrier();  // and goes on afterwards
}

void read_shared_kernel(float* out) {
  wait_for_previous();
  out[threadIdx.x] = shared_memory<float>()[threadIdx.x];
}

void test_shared_memory_is_nan() {
  std::array<float, 32> out{};
  launch({dim3(1), dim3(32), 128}, read_shared_kernel, out.data());
  for (float value : out) CHECK(value != value, "shared memory holds ", value);
}

// A neighbour's element without a barrier in between.
void race_kernel(float* out) {
  wait_for_previous();
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

void test_race_shows() {
  std::vector<uint32_t> first(64), other(64);
  launch({dim3(1), dim3(64), 256}, race_kernel, reinterpret_cast<float*>(first.data()));
  set_seed(1);
  launch({dim3(1), dim3(64), 256}, race_kernel, reinterpret_cast<float*>(other.data()));
  CHECK(first != other, "a race went unseen");
}

void copy_kernel(const float* in, float* early, float* late) {
  wait_for_previous();
  float4* shared = shared_memory<float4>();
  const int i = static_cast<int>(threadIdx.x);
  copy_async(shared + i, in + 4 * i, 16);
  commit_copies();
  copy_async(shared + 32 + i, in, 0);
  commit_copies();
  wait_copies<1>();
  early[i] = shared[i].y;
  late[i] = shared[32 + i].y;
  wait_copies<0>();
  late[32 + i] = shared[32 + i].y;
}

void test_copies_are_late() {
  std::vector<float> in(128), early(32), late(64);
  for (int i = 0; i < 128; ++i) in[i] = static_cast<float>(i);
  launch({dim3(1), dim3(32), 1024}, copy_kernel, static_cast<const float*>(in.data()), early.data(), late.data());
  for (int i = 0; i < 32; ++i) {
    CHECK(early[i] == static_cast<float>(4 * i + 1), "a copy that was waited for has ", early[i]);
    CHECK(late[i] != late[i], "a copy came before it was waited for");
    CHECK(late[32 + i] == 0, "a copy of no bytes left ", late[32 + i]);
  }
}

// The last of all blocks adds what each has written.
void last_block_kernel(int* parts, int* sum, unsigned* counter) {
  wait_for_previous();
  int* last = shared_memory<int>();
  const int i = static_cast<int>(threadIdx.x), blocks = static_cast<int>(gridDim.x);
  parts[static_cast<int>(blockIdx.x) * 32 + i] = 1;
  __syncthreads();
  if (i == 0) *last = comes_last(counter, gridDim.x);
  __syncthreads();
  if (!*last || i != 0) return;
  for (int p = 0; p < blocks * 32; ++p) *sum += parts[p];
}

void test_last_block() {
  unsigned counter = 0;
  for (unsigned blocks : {1u, 5u}) {  // the second launch finds the counter as the first left it
    std::vector<int> parts(blocks * 32);
    int sum = 0;
    launch({dim3(blocks), dim3(32), 16}, last_block_kernel, parts.data(), &sum, &counter);
    CHECK(sum == static_cast<int>(blocks) * 32 && counter == 0, "the last of ", blocks, " blocks found ", sum);
  }
}

// Fragments filled by the formulas of the PTX manual ("Matrix Fragments for mma.m16n8k16"), apart from the emulator's own.
void mma_kernel(const uint16_t* a, const uint16_t* b, float* c) {
  wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x), group = lane >> 2, in_group = lane % 4;
  uint32_t as[4] = {}, bs[2] = {};
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8, col = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
    as[i / 2] |= static_cast<uint32_t>(a[row * 16 + col]) << i % 2 * 16;
  }
  for (int i = 0; i < 4; ++i) {
    const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), col = group;
    bs[i / 2] |= static_cast<uint32_t>(b[row * 8 + col]) << i % 2 * 16;
  }
  FragmentC acc;
  const auto at = [&](int i) { return (i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1); };
  for (int i = 0; i < 4; ++i) acc.v[i] = c[at(i)];
  mma(acc, {as[0], as[1], as[2], as[3]}, {bs[0], bs[1]});
  for (int i = 0; i < 4; ++i) c[at(i)] = acc.v[i];
}

void test_mma() {
  std::mt19937 random(1);
  std::vector<uint16_t> a(256), b(128);
  std::vector<float> c(128), expected(128);
  const auto small = [&] { return static_cast<float>(static_cast<int>(random() % 17) - 8); };  // sums are exact
  for (uint16_t& v : a) v = static_cast<uint16_t>(pack_bf16(small(), 0));
  for (uint16_t& v : b) v = static_cast<uint16_t>(pack_bf16(small(), 0));
  for (int i = 0; i < 128; ++i) {
    expected[i] = c[i] = small();
    for (int k = 0; k < 16; ++k) expected[i] += bf16_low(a[i / 8 * 16 + k]) * bf16_low(b[k * 8 + i % 8]);
  }
  launch({dim3(1), dim3(32)}, mma_kernel, static_cast<const uint16_t*>(a.data()), static_cast<const uint16_t*>(b.data()),
         c.data());
  CHECK(c == expected, "mma: ", c, " is not ", expected);
}

void test_rounding() {
  CHECK(pack_bf16(1.f, -2.f) == 0xc0003f80u, "1 and -2");
  CHECK((pack_bf16(1.00390625f, 1.01171875f) == 0x3f823f80u), "halves go to even");
}

}  // namespace
}  // namespace gptoss::cuda

int main() {
  using namespace gptoss::cuda;
  try {
    test_rounding();
    for (int seed = 0; seed < 5; ++seed) {
      set_seed(seed);
      test_collectives();
      test_barrier();
      test_lost_threads();
      test_shared_memory_is_nan();
      test_copies_are_late();
      test_last_block();
      test_mma();
    }
    set_seed(0);
    test_race_shows();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "test_emulator: %s\n", error.what());
    return 1;
  }
  std::puts("test_emulator: all passed");
}
