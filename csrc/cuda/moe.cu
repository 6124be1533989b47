// The plumbing around the expert products: the router, the sort of tokens by expert, and the weighted sum of their outputs.
// All of it on the card; no sum uses an atomic, and every order is a function of the token alone.
#include "cuda/kernels.h"

namespace gptoss::cuda {
namespace {

constexpr int kRouteThreads = 256, kDispatchThreads = 1024, kCombineThreads = 256;

// Whether logit a of expert i goes before logit b of expert j (none where j < 0). A NaN goes last.
__device__ __forceinline__ bool better(float a, int i, float b, int j) {
  if (i < 0) return false;
  if (j < 0) return true;
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan || b_nan) return a_nan == b_nan ? i < j : b_nan;
  return a > b || (a == b && i < j);
}

// One block a token. Logits in float32: a warp an expert, lanes stride over the inputs; then one warp takes the k best and
// their softmax. Bytes: the router's weights, from the second-level cache.
__global__ void __launch_bounds__(kRouteThreads)
    route_kernel(int32_t* ids, float* weights, const float* t, const uint16_t* router, const float* bias, int hidden,
                 int experts, int k) {
  wait_for_previous();
  float* logits = shared_memory<float>();                   // [experts]
  float* chosen = logits + experts;                         // [k]
  int32_t* taken = reinterpret_cast<int32_t*>(chosen + k);  // [experts]
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const float2* x = reinterpret_cast<const float2*>(t + static_cast<int64_t>(blockIdx.x) * hidden);
  for (int e = warp; e < experts; e += kRouteThreads / kWarp) {
    const uint32_t* w = reinterpret_cast<const uint32_t*>(router + static_cast<int64_t>(e) * hidden);
    float first = 0, second = 0;
    for (int i = lane; i < hidden / 2; i += kWarp) {
      first = fmaf(bf16_low(w[i]), x[i].x, first);
      second = fmaf(bf16_high(w[i]), x[i].y, second);
    }
    const float sum = warp_sum(first + second);
    if (lane == 0) {
      logits[e] = sum + bias[e];
      taken[e] = 0;
    }
  }
  __syncthreads();
  if (warp != 0) return;
  for (int j = 0; j < k; ++j) {
    float best = 0;
    int id = -1;
    for (int e = lane; e < experts; e += kWarp)
      if (!taken[e] && better(logits[e], e, best, id)) best = logits[e], id = e;
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, best, mask);
      const int other_id = __shfl_xor_sync(kAllLanes, id, mask);
      if (better(other, other_id, best, id)) best = other, id = other_id;
    }
    if (lane == 0) {
      taken[id] = 1;
      chosen[j] = best;
      ids[static_cast<int64_t>(blockIdx.x) * k + j] = id;
    }
    __syncwarp();
  }
  if (lane != 0) return;
  const float largest = chosen[0];
  float sum = 0;
  for (int j = 0; j < k; ++j) sum += chosen[j] = expf(chosen[j] - largest);
  for (int j = 0; j < k; ++j) weights[static_cast<int64_t>(blockIdx.x) * k + j] = chosen[j] / sum;
}

// Sorts (token, choice) slots by expert, tokens in order, and cuts each expert's into tiles. One block; a warp takes an expert
// and finds its slots with votes, once to count and once to write.
__global__ void __launch_bounds__(kDispatchThreads)
    dispatch_kernel(int32_t* slots, TokenTile* tiles, int32_t* n_tiles, const int32_t* ids, int n, int experts, int tile) {
  wait_for_previous();
  int32_t* counts = shared_memory<int32_t>();  // [experts]
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  constexpr int kWarps = kDispatchThreads / kWarp;
  for (int e = warp; e < experts; e += kWarps) {
    int count = 0;
    for (int i = 0; i < n; i += kWarp) count += __popc(__ballot_sync(kAllLanes, i + lane < n && ids[i + lane] == e));
    if (lane == 0) counts[e] = count;
  }
  __syncthreads();
  for (int e = warp; e < experts; e += kWarps) {
    int first = 0, first_tile = 0;  // of the experts before this one
    for (int before = lane; before < e; before += kWarp) {
      first += counts[before];
      first_tile += (counts[before] + tile - 1) / tile;
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      first += __shfl_xor_sync(kAllLanes, first, mask);
      first_tile += __shfl_xor_sync(kAllLanes, first_tile, mask);
    }
    const int count = counts[e], own_tiles = (count + tile - 1) / tile;
    for (int i = lane; i < own_tiles; i += kWarp)
      tiles[first_tile + i] = {e, first + i * tile, count - i * tile < tile ? count - i * tile : tile};
    if (e == experts - 1 && lane == 0) *n_tiles = first_tile + own_tiles;
    if (count == 0) continue;
    for (int i = 0; i < n; i += kWarp) {
      const bool mine = i + lane < n && ids[i + lane] == e;
      const unsigned votes = __ballot_sync(kAllLanes, mine);
      if (mine) slots[first + __popc(votes & ((1u << lane) - 1))] = i + lane;
      first += __popc(votes);
    }
  }
}

// x += sum over the choices, best first, of weight * output.                 outputs: [n, k, hidden]   weights: [n, k]
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(float* x, const float* outputs, const float* weights, int k, int hidden) {
  wait_for_previous();
  const int64_t row = blockIdx.x;
  for (int i = static_cast<int>(threadIdx.x); i < hidden; i += kCombineThreads) {
    float sum = 0;
    for (int j = 0; j < k; ++j) sum = fmaf(weights[row * k + j], outputs[(row * k + j) * hidden + i], sum);
    x[row * hidden + i] += sum;
  }
}

}  // namespace

void route(int32_t* ids, float* weights, const float* t, const uint16_t* router, const float* bias, int64_t n, int64_t hidden,
           int64_t experts, int64_t k, cudaStream_t stream) {
  const Launch l{dim3(static_cast<unsigned>(n)), dim3(kRouteThreads), (2 * experts + k) * sizeof(float), stream};
  launch(l, route_kernel, ids, weights, t, router, bias, static_cast<int>(hidden), static_cast<int>(experts),
         static_cast<int>(k));
}

void dispatch(int32_t* slots, TokenTile* tiles, int32_t* n_tiles, const int32_t* ids, int64_t n_slots, int64_t experts,
              int64_t tile, cudaStream_t stream) {
  const Launch l{dim3(1), dim3(kDispatchThreads), experts * sizeof(int32_t), stream};
  launch(l, dispatch_kernel, slots, tiles, n_tiles, ids, static_cast<int>(n_slots), static_cast<int>(experts),
         static_cast<int>(tile));
}

void combine(float* x, const float* outputs, const float* weights, int64_t n, int64_t k, int64_t hidden, cudaStream_t stream) {
  launch({dim3(static_cast<unsigned>(n)), dim3(kCombineThreads), 0, stream}, combine_kernel, x, outputs, weights,
         static_cast<int>(k), static_cast<int>(hidden));
}

}  // namespace gptoss::cuda
