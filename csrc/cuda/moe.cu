// The router and the sort of tokens by expert: all that decides which weights the experts' products read. On the card, without
// a round trip to the host; every order is a function of the token alone.
//
// route: blocks of 256 threads share the work by tokens (1 of few, 4 of many) and experts (8). A block norms its rows (where it
//   is asked to) into shared memory; a warp makes the logits of some of its experts and tokens, in float32: a lane adds the
//   products of 4 of every 128 inputs, the even and the odd ones apart, then lanes are added by halves. Which warp does which
//   changes no sum. The router's weights are on their way before the kernel that writes x has ended.
//   Of the blocks of the same tokens, the last to finish takes the k best of each token and their softmax. Of those, where the
//   batch is not large, the last sorts. Rows that only fill up a batch choose no experts, so no weights are read for them.
// dispatch: the sort alone, by one block.
// Bytes: the router's weights, once from memory, then from the second-level cache.  Operations: 2 n experts hidden.
#include <algorithm>

#include "cuda/norm.cuh"
#include "cuda/kernels.h"

namespace gptoss::cuda {
namespace {

constexpr int kRouteThreads = NormBlock::kThreads, kRouteWarps = kRouteThreads / kWarp, kDispatchThreads = 1024;
constexpr int kFewTokens = 8;          // up to here, blocks of one token
constexpr int kManyTokens = 4;         // of a block, beyond
constexpr int kMaxExpertsABlock = 8;   // of them, fewer where shared memory is short
constexpr size_t kShared = 96 << 10;   // that every card has
constexpr int64_t kFusedSlots = 4096;  // that one block of 256 threads sorts in good time

// ---------------------------------------------------------------------------------------------------------------- sort

// The lanes whose value is this lane's. 0 <= value < 2^bits
__device__ __forceinline__ unsigned peers(int value, int bits) {
  unsigned same = kAllLanes;
  for (int b = 0; b < bits; ++b) {
    const bool set = value >> b & 1;
    const unsigned votes = __ballot_sync(kAllLanes, set);
    same &= set ? votes : ~votes;
  }
  return same;
}

// Sorts (token, choice) slots by expert, tokens in order, and cuts each expert's into tiles: a counting sort, in which each
// warp has a range of the slots. All threads of the block come here; ids must be visible to them. counts: [warps, experts],
// shared
__device__ __forceinline__ void sort_slots(const DispatchArgs& a, const int32_t* ids, int n, int experts, int32_t* counts) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), warps = threads / kWarp;
  const int warp = thread / kWarp, lane = thread % kWarp;
  const int share = (n + warps * kWarp - 1) / (warps * kWarp) * kWarp, begin = warp * share;
  const int end = begin + share < n ? begin + share : n;
  int bits = 0;
  while (experts >> bits) ++bits;  // `experts` stands for none
  int32_t* mine = counts + warp * experts;
  for (int i = thread; i < warps * experts; i += threads) counts[i] = 0;
  __syncthreads();
  for (int i = begin; i < end; i += kWarp) {
    const int id = i + lane < end ? ids[i + lane] : experts;
    const unsigned same = peers(id, bits);
    if (id < experts && (same & ((1u << lane) - 1)) == 0) mine[id] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  if (warp == 0) {  // counts to first places; a lane has several experts in a row
    const int each = (experts + kWarp - 1) / kWarp, first_expert = lane * each;
    const int end_expert = first_expert + each < experts ? first_expert + each : experts;
    int slots = 0, tiles = 0;
    for (int e = first_expert; e < end_expert; ++e) {
      int count = 0;
      for (int w = 0; w < warps; ++w) count += counts[w * experts + e];
      slots += count;
      tiles += (count + a.tile - 1) / a.tile;
    }
    int slot = slots, tile = tiles;
    for (int d = 1; d < kWarp; d *= 2) {
      const int before = __shfl_up_sync(kAllLanes, slot, d), tiles_before = __shfl_up_sync(kAllLanes, tile, d);
      if (lane >= d) slot += before, tile += tiles_before;
    }
    if (lane == kWarp - 1) *a.n_tiles = tile;
    slot -= slots;
    tile -= tiles;
    for (int e = first_expert; e < end_expert; ++e) {
      const int first = slot;
      for (int w = 0; w < warps; ++w) {
        const int count = counts[w * experts + e];
        counts[w * experts + e] = slot;
        slot += count;
      }
      for (int at = first; at < slot; at += a.tile) a.tiles[tile++] = {e, at, slot - at < a.tile ? slot - at : a.tile};
    }
  }
  __syncthreads();
  for (int i = begin; i < end; i += kWarp) {
    const int id = i + lane < end ? ids[i + lane] : experts;
    const unsigned same = peers(id, bits), before = same & ((1u << lane) - 1);
    if (id < experts) a.slots[mine[id] + __popc(before)] = i + lane;
    __syncwarp();
    if (id < experts && before == 0) mine[id] += __popc(same);
    __syncwarp();
  }
}

__global__ void __launch_bounds__(kDispatchThreads) dispatch_kernel(DispatchArgs a, const int32_t* ids, int n, int experts) {
  let_next_start();
  wait_for_previous();
  sort_slots(a, ids, n, experts, shared_memory<int32_t>());
}

// -------------------------------------------------------------------------------------------------------------- router

// Whether logit a of expert i goes before logit b of expert j (none where j < 0). A NaN goes last.
__device__ __forceinline__ bool better(float a, int i, float b, int j) {
  if (i < 0) return false;
  if (j < 0) return true;
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan || b_nan) return a_nan == b_nan ? i < j : b_nan;
  return a > b || (a == b && i < j);
}

// One warp: the k best of a token's logits and their softmax.
__device__ __forceinline__ void choose(int32_t* ids, float* weights, const float* logits, int experts, int k) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned taken = 0;  // bit i: expert lane + 32 i
  float chosen = 0;    // of lane j: choice j
  for (int j = 0; j < k; ++j) {
    float best = 0;
    int id = -1;
    for (int e = lane; e < experts; e += kWarp) {
      const float logit = logits[e];
      if (!(taken >> e / kWarp & 1) && better(logit, e, best, id)) best = logit, id = e;
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, best, mask);
      const int other_id = __shfl_xor_sync(kAllLanes, id, mask);
      if (better(other, other_id, best, id)) best = other, id = other_id;
    }
    if (lane == id % kWarp) taken |= 1u << id / kWarp;
    if (lane == j) {
      chosen = best;
      ids[j] = id;
    }
  }
  const float power = expf(chosen - __shfl_sync(kAllLanes, chosen, 0));
  float sum = 0;
  for (int j = 0; j < k; ++j) sum += __shfl_sync(kAllLanes, power, j);
  if (lane < k) weights[lane] = power / sum;
}

// logits += t W^T for kExperts experts and kTokens tokens, a warp's work.
//                                              t: [tokens, hidden] float32   w: [experts, hidden] bfloat16, both shared
template <int kExperts, int kTokens>
__device__ __forceinline__ void dot(float (&sums)[kExperts][kTokens], const float* t, const uint16_t* w, int hidden) {
  float even[kExperts][kTokens] = {}, odd[kExperts][kTokens] = {};
  for (int i = static_cast<int>(threadIdx.x) % kWarp * 4; i < hidden; i += kWarp * 4) {
    float4 x[kTokens];
#pragma unroll
    for (int n = 0; n < kTokens; ++n) x[n] = *reinterpret_cast<const float4*>(t + n * hidden + i);
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      const uint2 v = *reinterpret_cast<const uint2*>(w + e * hidden + i);
#pragma unroll
      for (int n = 0; n < kTokens; ++n) {
        even[e][n] = fmaf(bf16_low(v.y), x[n].z, fmaf(bf16_low(v.x), x[n].x, even[e][n]));
        odd[e][n] = fmaf(bf16_high(v.y), x[n].w, fmaf(bf16_high(v.x), x[n].y, odd[e][n]));
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kExperts; ++e) {
#pragma unroll
    for (int n = 0; n < kTokens; ++n) sums[e][n] = warp_sum(even[e][n] + odd[e][n]);
  }
}

// Shared memory of a block: [control: 4 ints][sums of squares: tokens x 8][t: tokens x hidden][weights: experts x hidden bf16]
// [norm's weights: hidden, blocks of one token only]; and after the logits, from the sums of squares on, counts of the sort.
template <int kTokens>
size_t route_shared_bytes(int64_t hidden, int64_t experts_a_block, int64_t experts) {
  const int64_t floats = kTokens * (NormBlock::kWarps + hidden) + experts_a_block * hidden / 2 + (kTokens == 1 ? hidden : 0);
  return 16 + 4 * std::max<int64_t>(floats, kRouteWarps * experts);
}

template <int kTokens>
__global__ void __launch_bounds__(kRouteThreads, 2) route_kernel(RouteArgs a, int experts_a_block) {
  let_next_start();
  const int hidden = static_cast<int>(a.hidden), experts = static_cast<int>(a.experts), k = static_cast<int>(a.k);
  int* last = shared_memory<int>();
  float* sums = reinterpret_cast<float*>(last + 4);
  float* t = sums + kTokens * NormBlock::kWarps;
  uint16_t* router = reinterpret_cast<uint16_t*>(t + kTokens * hidden);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int first_expert = static_cast<int>(blockIdx.y) * experts_a_block;
  const int n_experts = experts - first_expert < experts_a_block ? experts - first_expert : experts_a_block;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int n_tokens = a.n - first < kTokens ? static_cast<int>(a.n - first) : kTokens;

  const float* norm_weight = a.norm_weight;
  if (kTokens == 1 && norm_weight) {
    float* copy = reinterpret_cast<float*>(router + experts_a_block * hidden);
    for (int i = thread * 4; i < hidden; i += kRouteThreads * 4) copy_async(copy + i, norm_weight + i, 16);
    norm_weight = copy;
  }
  commit_copies();
  const uint16_t* from = a.router + static_cast<int64_t>(first_expert) * hidden;
  for (int i = thread * 8; i < n_experts * hidden; i += kRouteThreads * 8) copy_async(router + i, from + i, 16);
  commit_copies();
  wait_for_previous();

  const float* x = a.x + first * hidden;
  float4* rows = reinterpret_cast<float4*>(t);
  if (norm_weight) {
    square_sums<kTokens>(sums, x, n_tokens, hidden);
    wait_copies<1>();
    __syncthreads();
    each_normed<3>(sums, x, n_tokens, hidden, norm_weight, a.eps, [&](int row, int i, float4 value) {
      rows[row * (hidden / 4) + i] = value;
      if (blockIdx.y != 0) return;
      reinterpret_cast<float4*>(a.t + (first + row) * hidden)[i] = value;
      reinterpret_cast<uint2*>(a.rounded.data + (first + row) * a.rounded.stride)[i] = pack_bf16(value);
    });
  } else {
    for (int i = thread; i < n_tokens * (hidden / 4); i += kRouteThreads) rows[i] = reinterpret_cast<const float4*>(x)[i];
  }
  if (norm_weight && blockIdx.y == 0) {  // zeros up to whole groups of 64
    const int pad = static_cast<int>(a.rounded.stride) - hidden;
    for (int i = thread; i < n_tokens * pad; i += kRouteThreads)
      a.rounded.data[(first + i / pad) * a.rounded.stride + hidden + i % pad] = 0;
  }
  for (int i = n_tokens * hidden + thread; i < kTokens * hidden; i += kRouteThreads) t[i] = 0;
  wait_copies<0>();
  __syncthreads();

  constexpr int kPerWarp = kTokens == 1 ? 1 : 2;  // tokens, and experts, of a warp at a time
  constexpr int kRowUnits = kTokens / kPerWarp;
  for (int unit = warp; unit / kRowUnits * kPerWarp < n_experts; unit += kRouteWarps) {
    const int e = unit / kRowUnits * kPerWarp, row = unit % kRowUnits * kPerWarp;
    float logit[kPerWarp][kPerWarp];
    dot(logit, t + row * hidden, router + e * hidden, hidden);
#pragma unroll
    for (int i = 0; i < kPerWarp * kPerWarp; ++i) {
      const int expert = e + i / kPerWarp, token = row + i % kPerWarp;
      if (lane == 0 && expert < n_experts && token < n_tokens)
        a.logits[(first + token) * experts + first_expert + expert] =
            logit[i / kPerWarp][i % kPerWarp] + a.bias[first_expert + expert];
    }
  }
  __syncthreads();
  if (thread == 0) *last = comes_last(a.counters + 1 + blockIdx.x, gridDim.y);
  __syncthreads();
  if (!*last) return;
  const int64_t real = a.n_rows ? *a.n_rows : a.n;
  for (int64_t row = first + warp; row < first + n_tokens; row += kRouteWarps) {
    if (row < real)
      choose(a.ids + row * k, a.weights + row * k, a.logits + row * experts, experts, k);
    else if (lane < k)
      a.ids[row * k + lane] = experts, a.weights[row * k + lane] = 0;
  }
  if (!a.dispatch.slots) return;
  __syncthreads();
  if (thread == 0) *last = gridDim.x == 1 || comes_last(a.counters, gridDim.x);
  __syncthreads();
  if (*last) sort_slots(a.dispatch, a.ids, static_cast<int>(a.n) * k, experts, reinterpret_cast<int32_t*>(sums));
}

template <int kTokens>
void start_route(const RouteArgs& a, cudaStream_t stream) {
  int experts_a_block = kMaxExpertsABlock;
  while (experts_a_block > 2 && route_shared_bytes<kTokens>(a.hidden, experts_a_block, a.experts) > kShared)
    experts_a_block /= 2;
  const size_t bytes = route_shared_bytes<kTokens>(a.hidden, experts_a_block, a.experts);
  CHECK(bytes <= kShared, "a hidden size of ", a.hidden, " with ", a.experts, " experts is too large for the router");
  const dim3 grid(static_cast<unsigned>(ceil_div(a.n, kTokens)), static_cast<unsigned>(ceil_div(a.experts, experts_a_block)));
  launch({grid, dim3(kRouteThreads), bytes, stream}, route_kernel<kTokens>, a, experts_a_block);
}

}  // namespace

bool routes_and_dispatches(int64_t n_slots) { return n_slots <= kFusedSlots; }

void route(const RouteArgs& args, cudaStream_t stream) {
  CHECK(args.k <= kWarp && args.experts <= kWarp * kWarp, "a router of ", args.k, " of ", args.experts, " experts");
  args.n <= kFewTokens ? start_route<1>(args, stream) : start_route<kManyTokens>(args, stream);
}

// Every expert that has slots has one tile that may not be full.
int64_t max_tiles(int64_t n_slots, int64_t experts, int64_t tile) {
  const int64_t used = std::min(n_slots, experts);
  return used + (n_slots - used) / tile;
}

void dispatch(const DispatchArgs& args, const int32_t* ids, int64_t n_slots, int64_t experts, cudaStream_t stream) {
  const Launch l{dim3(1), dim3(kDispatchThreads), kDispatchThreads / kWarp * experts * sizeof(int32_t), stream};
  launch(l, dispatch_kernel, args, ids, static_cast<int>(n_slots), static_cast<int>(experts));
}

}  // namespace gptoss::cuda
