// The emulator does what it says: collectives and fragments by their documentation, and it catches what it is there to catch.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/common.cuh"
#include "emulator_checks.h"

namespace gptoss::cuda {
namespace {

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

// A sum over the lanes up to each, in 64 bits, and tickets from one counter.
void scan_kernel(unsigned long long* out, unsigned* tickets) {
  wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x);
  unsigned long long sum = 1ull << lane;
  for (int delta = 1; delta < 32; delta *= 2) {
    const unsigned long long before = __shfl_up_sync(kAllLanes, sum, delta);
    if (lane >= delta) sum += before;
  }
  out[lane] = sum << 8 | atomicAdd(tickets, 1u);
}

void test_scan() {
  std::array<unsigned long long, 32> out;
  unsigned tickets = 0, seen = 0;
  launch({dim3(1), dim3(32)}, scan_kernel, out.data(), &tickets);
  for (int i = 0; i < 32; ++i) {
    CHECK(out[i] >> 8 == (2ull << i) - 1, "lane ", i, " has ", out[i] >> 8);
    seen |= 1u << (out[i] & 31);
  }
  CHECK(tickets == 32 && seen == ~0u, tickets, " tickets, ", seen);
  CHECK(__ffs(0x50) == 5 && __ffs(0) == 0 && __clz(0) == 32 && __clz(-1) == 0 && __clz(0x100) == 23, "places of bits");
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

// 32 rows of 8 numbers, in an order of their own: row r of matrix m is row 5 (8 m + r) % 32 in memory.
void matrices_kernel(uint32_t* plain, uint32_t* transposed, uint32_t* moved) {
  wait_for_previous();
  uint16_t* rows = shared_memory<uint16_t>();
  const int lane = static_cast<int>(threadIdx.x), place = 5 * lane % 32;
  for (int i = 0; i < 8; ++i) rows[place * 8 + i] = static_cast<uint16_t>(lane * 8 + i);  // row lane % 8 of matrix lane / 8
  __syncwarp();
  const FragmentA a = ldmatrix<false>(rows + place * 8), t = ldmatrix<true>(rows + place * 8);
  const uint32_t words[] = {a.a0, a.a1, a.a2, a.a3}, columns[] = {t.a0, t.a1, t.a2, t.a3};
  for (int m = 0; m < 4; ++m) {
    plain[m * 32 + lane] = words[m];
    transposed[m * 32 + lane] = columns[m];
    moved[m * 32 + lane] = movmatrix(words[m]);
  }
}

// PTX manual, "ldmatrix": thread 4 r + c holds elements 2 c and 2 c + 1 of row r; with .trans, of column r.
void test_matrices() {
  std::array<uint32_t, 128> plain, transposed, moved;
  launch({dim3(1), dim3(32), 512}, matrices_kernel, plain.data(), transposed.data(), moved.data());
  for (uint32_t i = 0; i < 128; ++i) {
    const uint32_t matrix = i / 32 * 64, r = i % 32 / 4, c = i % 4 * 2;
    const uint32_t row = (matrix + r * 8 + c) | (matrix + r * 8 + c + 1) << 16;
    const uint32_t column = (matrix + c * 8 + r) | (matrix + (c + 1) * 8 + r) << 16;
    CHECK(plain[i] == row, "ldmatrix: word ", i, " is ", plain[i], ", not ", row);
    CHECK(transposed[i] == column, "ldmatrix.trans: word ", i, " is ", transposed[i], ", not ", column);
    CHECK(moved[i] == column, "movmatrix: word ", i, " is ", moved[i], ", not ", column);
  }
}

void test_rounding() {
  CHECK(pack_bf16(1.f, -2.f) == 0xc0003f80u, "1 and -2");
  CHECK((pack_bf16(1.00390625f, 1.01171875f) == 0x3f823f80u), "halves go to even");
}

// --- runtime ----------------------------------------------------------------------------------------------------------

void add_kernel(int* sum, int value) {
  wait_for_previous();
  if (threadIdx.x == 0) *sum += value;
}

void expect_status(cudaError_t status, cudaError_t expected) {
  CHECK(status == expected, "\"", cudaGetErrorString(status), "\", not \"", cudaGetErrorString(expected), "\"");
}

// What goes to the stream is kept while it is captured, arguments as they were, and done at every launch of the graph.
void test_graph() {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  int sum = 0, value = 5, copy = 0;
  expect_status(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  expect_status(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  launch({dim3(1), dim3(32), 0, stream}, add_kernel, &sum, value);
  value = 7;
  expect_status(cudaMemcpyAsync(&copy, &sum, sizeof sum, cudaMemcpyDeviceToHost, stream), cudaSuccess);
  launch({dim3(1), dim3(32), 0, stream}, add_kernel, &sum, 100);
  expect_status(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  CHECK(sum == 0 && copy == 0, "a captured launch ran");
  expect_status(cudaGraphInstantiate(&exec, graph), cudaSuccess);
  expect_status(cudaGraphDestroy(graph), cudaSuccess);
  for (int i = 1; i <= 2; ++i) {
    expect_status(cudaGraphLaunch(exec, stream), cudaSuccess);
    CHECK(sum == 105 * i && copy == sum - 100, "launch ", i, ": ", sum, " and ", copy);
  }
  expect_status(cudaGraphExecDestroy(exec), cudaSuccess);
  expect_status(cudaStreamDestroy(stream), cudaSuccess);
}

void test_what_a_capture_forbids() {
  void* memory = nullptr;
  expect_status(cudaMalloc(&memory, 256), cudaSuccess);
  const std::function<cudaError_t(cudaStream_t)> forbidden[] = {
      [](cudaStream_t) {
        void* more = nullptr;
        return cudaMalloc(&more, 256);
      },
      [&](cudaStream_t) { return cudaFree(std::exchange(memory, nullptr)); },
      [](cudaStream_t stream) { return cudaStreamSynchronize(stream); },
      [](cudaStream_t) { return cudaEventSynchronize(nullptr); },
  };
  for (const auto& call : forbidden) {
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    expect_status(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    expect_status(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    expect_status(call(stream), cudaErrorStreamCaptureUnsupported);
    expect_status(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureInvalidated);
    expect_status(cudaStreamSynchronize(stream), cudaSuccess);  // and the stream is as before
    expect_status(cudaStreamDestroy(stream), cudaSuccess);
  }
}

void test_memory() {
  size_t before = 0, after = 0, total = 0;
  void* memory = nullptr;
  setenv("GPTOSS_EMULATOR_MEMORY", "1000000", 1);
  cudaMemGetInfo(&before, &total);
  expect_status(cudaMalloc(&memory, 1000), cudaSuccess);
  cudaMemGetInfo(&after, &total);
  CHECK(total == 1000000 && before - after == 1024, before - after, " bytes of ", total);
  void* more = nullptr;
  expect_status(cudaMalloc(&more, 999000), cudaErrorMemoryAllocation);
  expect_status(cudaFree(memory), cudaSuccess);
  cudaMemGetInfo(&after, &total);
  CHECK(after == before, "freed memory counts");
  unsetenv("GPTOSS_EMULATOR_MEMORY");
}

// The second kernel fails: it does not run, and from then on nothing works until the reset.
void test_failure() {
  int sum = 0;
  setenv("GPTOSS_EMULATOR_FAIL", "2", 1);
  launch({dim3(1), dim3(32)}, add_kernel, &sum, 1);
  launch({dim3(1), dim3(32)}, add_kernel, &sum, 1);
  CHECK(sum == 1, "a failing kernel ran");
  for (int i = 0; i < 2; ++i) {
    expect_error("cudaLaunchKernelEx failed: an illegal memory access",
                 [&] { launch({dim3(1), dim3(32)}, add_kernel, &sum, 1); });
    void* memory = nullptr;
    expect_status(cudaMalloc(&memory, 16), cudaErrorIllegalAddress);
    expect_status(cudaStreamSynchronize(nullptr), cudaErrorIllegalAddress);
    expect_status(cudaGetLastError(), cudaErrorIllegalAddress);
  }
  expect_status(cudaDeviceReset(), cudaSuccess);
  for (int i = 0; i < 3; ++i) launch({dim3(1), dim3(32)}, add_kernel, &sum, 1);
  CHECK(sum == 4, "after a reset kernels run again: ", sum);
  unsetenv("GPTOSS_EMULATOR_FAIL");
}

void test_devices() {
  int n = 0;
  cudaDeviceProp properties;
  setenv("GPTOSS_EMULATOR_DEVICES", "2", 1);
  setenv("GPTOSS_EMULATOR_SM", "75", 1);
  expect_status(cudaGetDeviceCount(&n), cudaSuccess);
  expect_status(cudaGetDeviceProperties(&properties, 1), cudaSuccess);
  CHECK(n == 2 && properties.major == 7 && properties.minor == 5, n, " devices of ", properties.major, ".", properties.minor);
  expect_status(cudaSetDevice(2), cudaErrorInvalidDevice);
  setenv("GPTOSS_EMULATOR_DEVICES", "0", 1);
  expect_status(cudaGetDeviceCount(&n), cudaErrorInsufficientDriver);
  unsetenv("GPTOSS_EMULATOR_DEVICES");
  unsetenv("GPTOSS_EMULATOR_SM");
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
      test_scan();
      test_barrier();
      test_lost_threads();
      test_shared_memory_is_nan();
      test_copies_are_late();
      test_last_block();
      test_mma();
      test_matrices();
    }
    set_seed(0);
    test_race_shows();
    test_graph();
    test_what_a_capture_forbids();
    test_memory();
    test_devices();
    test_failure();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "test_emulator: %s\n", error.what());
    return 1;
  }
  std::puts("test_emulator: all passed");
}
