// out = x W^T for bfloat16 and MXFP4 weights, with the epilogues of the model: bias, residual, clamped SwiGLU; for one matrix
// or for the experts of a batch (tiles of a list).
//
// Weights are the M operand of mma.sync, 16 rows at a time, dequantized in registers; tokens are the N operand, 8 at a time.
// Two kernels share every sum:
//   narrow, tiles of 8 tokens: a block's 8 warps share 16 rows and each takes an eighth of the inputs. Memory bound: a lane
//     reads its own weights, 16 bytes at a time, several groups of 64 inputs ahead.
//   wide, tiles of 64 tokens: a block's 8 warps take 16 rows each; tokens go through shared memory, four stages deep.
// A column of an mma's result depends on that column alone, both kernels add the same products in the same order within an
// eighth of the inputs, and both add the eighths in order: so the result of a token has the same bits in either, whatever
// else is in the batch.
// MXFP4: the sum of a block of 32 inputs is multiplied by its scale, as on the CPU; codes are exact in bfloat16.
//
// Bytes: each weight once for every tile of tokens. Operations: 2 rows cols n.
#include "cuda/matmul.cuh"

namespace gptoss::cuda {
namespace {

struct Narrow {
  static constexpr int kTokens = 8, kSlices = 8, kThreads = kSlices * kWarp;
};
struct Wide {
  static constexpr int kTokens = 64, kWarps = 8, kThreads = kWarps * kWarp, kStages = 4;
};

template <bool kMxfp4>
__device__ __forceinline__ Group<kMxfp4> load_group(const MatmulArgs& a, int64_t block) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Group<kMxfp4> group;
  constexpr int kVectors = kMxfp4 ? 1 : 4;
  const uint4* from = reinterpret_cast<const uint4*>(a.codes) + block * kVectors * kWarp + lane;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) group.v[i] = load_once(from + i * kWarp);
  group.scales = kMxfp4 ? reinterpret_cast<const uint32_t*>(a.scales)[block * 8 + lane / 4] : 0;
  return group;
}

// acc[t] += group x tokens, 64 inputs. inputs(t, b): this lane's 8 inputs of block b (of 32) of its token in tile t of 8.
template <bool kMxfp4, int kTiles, class Inputs>
__device__ __forceinline__ void multiply(FragmentC (&acc)[kTiles], const Group<kMxfp4>& group, const Inputs& inputs) {
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    FragmentA first, second;
    float low = 1, high = 1;
    if constexpr (kMxfp4) {
      uint32_t r0[4], r8[4];
      decode(r0, b ? group.v[0].z : group.v[0].x);
      decode(r8, b ? group.v[0].w : group.v[0].y);
      first = {r0[0], r8[0], r0[1], r8[1]};
      second = {r0[2], r8[2], r0[3], r8[3]};
      low = scale_of(group.scales, b);
      high = scale_of(group.scales, 2 + b);
    } else {
      const uint4 r0 = group.v[2 * b], r8 = group.v[2 * b + 1];
      first = {r0.x, r8.x, r0.y, r8.y};
      second = {r0.z, r8.z, r0.w, r8.w};
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint4 x = inputs(t, b);
      if constexpr (kMxfp4) {
        FragmentC sum = {{0, 0, 0, 0}};
        mma(sum, first, {x.x, x.y});
        mma(sum, second, {x.z, x.w});
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[t].v[i] = fmaf(sum.v[i], i < 2 ? low : high, acc[t].v[i]);
      } else {
        mma(acc[t], first, {x.x, x.y});
        mma(acc[t], second, {x.z, x.w});
      }
    }
  }
}

__device__ __forceinline__ int64_t input_row(const MatmulArgs& a, const TokenTile& tile, int i) {
  return a.gather ? a.slots[tile.first + i] / a.gather : tile.first + i;
}

// Blocks go through the tiles of tokens first, so that neighbours in time share weights.
__device__ __forceinline__ bool find_tile(TokenTile& tile, const MatmulArgs& a, int tokens, int64_t n_tiles) {
  const int64_t index = blockIdx.x % n_tiles;
  if (a.tiles) {
    if (index >= *a.n_tiles) return false;
    tile = a.tiles[index];
    return true;
  }
  const int64_t first = index * tokens;
  tile = {0, static_cast<int32_t>(first), static_cast<int32_t>(a.n - first < tokens ? a.n - first : tokens)};
  return true;
}

template <bool kMxfp4, Epilogue kEpilogue>
__global__ void __launch_bounds__(Narrow::kThreads) narrow_kernel(MatmulArgs a, int64_t n_tiles) {
  wait_for_previous();
  constexpr int kAhead = kMxfp4 ? 6 : 3;  // groups whose loads are in flight
  float* sums = shared_memory<float>();   // [slices][16 rows][8 tokens]
  TokenTile tile;
  if (!find_tile(tile, a, Narrow::kTokens, n_tiles)) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4,
            c = lane % 4;
  const int64_t block = blockIdx.x / n_tiles, groups = ceil_div(a.cols, 64), share = ceil_div(groups, Narrow::kSlices);
  const int64_t begin = warp * share, end = begin + share < groups ? begin + share : groups;
  const int64_t base = (tile.expert * ceil_div(a.rows, 16) + block) * groups;
  const uint16_t* x = g < tile.n ? a.x.data + input_row(a, tile, g) * a.x.stride + 8 * c : nullptr;

  FragmentC acc[1] = {{{0, 0, 0, 0}}};
  for (int64_t first = begin; first < end; first += kAhead) {
    Group<kMxfp4> ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (first + i < end) ahead[i] = load_group<kMxfp4>(a, base + first + i);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= end) break;
      multiply<kMxfp4>(acc, ahead[i], [&](int, int b) {
        return x ? *reinterpret_cast<const uint4*>(x + (first + i) * 64 + b * 32) : uint4{0, 0, 0, 0};
      });
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[(warp * 16 + g + i / 2 * 8) * 8 + 2 * c + i % 2] = acc[0].v[i];
  __syncthreads();
  const int r = static_cast<int>(threadIdx.x) % 8, token = static_cast<int>(threadIdx.x) / 8;
  if (token >= tile.n) return;
  float low = 0, high = 0;
  for (int s = 0; s < Narrow::kSlices; ++s) {
    low += sums[(s * 16 + r) * 8 + token];
    high += sums[(s * 16 + r + 8) * 8 + token];
  }
  finish<kEpilogue>(a, tile, token, block, r, low, high);
}

// Stage s holds 64 inputs of 64 tokens: [token][8 chunks of 16 bytes], a token's chunks in the other order of halves where it
// is odd, so that the 8 lanes of one access phase (two tokens, four chunks) find different banks.
__device__ __forceinline__ int chunk_at(int token, int chunk) { return token * 8 + (chunk ^ (token % 2 * 4)); }

template <bool kMxfp4, Epilogue kEpilogue>
__global__ void __launch_bounds__(Wide::kThreads) wide_kernel(MatmulArgs a, int64_t n_tiles) {
  wait_for_previous();
  constexpr int kTiles = Wide::kTokens / 8, kChunks = Wide::kTokens * 8, kStages = Wide::kStages;
  uint4* stages = shared_memory<uint4>();  // [stages][tokens][8]
  TokenTile tile;
  if (!find_tile(tile, a, Wide::kTokens, n_tiles)) return;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, g = thread % kWarp / 4, c = thread % 4;
  const int64_t blocks = ceil_div(a.rows, 16), groups = ceil_div(a.cols, 64), share = ceil_div(groups, Narrow::kSlices);
  const int64_t block = blockIdx.x / n_tiles * Wide::kWarps + warp;
  const int64_t base = (tile.expert * blocks + block) * groups;
  const bool has_rows = block < blocks;

  constexpr int kCopies = kChunks / Wide::kThreads;  // a thread's: the same chunk of several tokens
  const uint16_t* from[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int token = (thread + i * Wide::kThreads) / 8;
    from[i] = a.x.data + (token < tile.n ? input_row(a, tile, token) * a.x.stride + thread % 8 * 8 : 0);
  }
  const auto fetch = [&](int64_t group) {
    if (group < groups) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int token = (thread + i * Wide::kThreads) / 8;
        const bool real = token < tile.n;
        copy_async(stages + group % kStages * kChunks + chunk_at(token, thread % 8), from[i] + (real ? group * 64 : 0),
                   real ? 16 : 0);
      }
    }
    commit_copies();
  };
  for (int i = 0; i < kStages - 1; ++i) fetch(i);

  FragmentC acc[kTiles], total[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) acc[t] = total[t] = {{0, 0, 0, 0}};
  Group<kMxfp4> next{};
  if (has_rows) next = load_group<kMxfp4>(a, base);
  for (int64_t group = 0; group < groups; ++group) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the group is there for all, and all are done with the stage that is filled next
    fetch(group + kStages - 1);
    if (!has_rows) continue;
    const Group<kMxfp4> weights = next;
    if (group + 1 < groups) next = load_group<kMxfp4>(a, base + group + 1);
    const uint4* stage = stages + group % kStages * kChunks;
    multiply<kMxfp4>(acc, weights, [&](int t, int b) { return stage[chunk_at(t * 8 + g, 4 * b + c)]; });
    if ((group + 1) % share == 0 || group + 1 == groups) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) total[t].v[i] += acc[t].v[i];
        acc[t] = {{0, 0, 0, 0}};
      }
    }
  }
  if (!has_rows) return;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = t * 8 + 2 * c + i;
      if (token < tile.n) finish<kEpilogue>(a, tile, token, block, g, total[t].v[i], total[t].v[2 + i]);
    }
  }
}

template <bool kMxfp4, Epilogue kEpilogue>
void start(const MatmulArgs& a, int64_t tile, cudaStream_t stream) {
  const int64_t n_tiles = a.tiles ? a.max_tiles : ceil_div(a.n, tile), blocks = ceil_div(a.rows, 16);
  const bool narrow = tile == Narrow::kTokens;
  const int64_t grid = n_tiles * (narrow ? blocks : ceil_div(blocks, Wide::kWarps));
  CHECK(grid < int64_t{1} << 31, "a product of ", a.rows, " outputs and ", a.n, " tokens is too large for one launch");
  Launch l{dim3(static_cast<unsigned>(grid)), dim3(narrow ? Narrow::kThreads : Wide::kThreads), 0, stream};
  l.shared_bytes = narrow ? Narrow::kSlices * 16 * 8 * sizeof(float) : Wide::kStages * Wide::kTokens * 64 * sizeof(uint16_t);
  launch(l, narrow ? narrow_kernel<kMxfp4, kEpilogue> : wide_kernel<kMxfp4, kEpilogue>, a, n_tiles);
}

template <bool kMxfp4>
void start(const MatmulArgs& a, Epilogue epilogue, int64_t tile, cudaStream_t stream) {
  switch (epilogue) {
    case Epilogue::kStore:
      return start<kMxfp4, Epilogue::kStore>(a, tile, stream);
    case Epilogue::kAdd:
      return start<kMxfp4, Epilogue::kAdd>(a, tile, stream);
    case Epilogue::kSwiglu:
      return start<kMxfp4, Epilogue::kSwiglu>(a, tile, stream);
  }
}

}  // namespace

int64_t matmul_tile(int64_t tokens_a_matrix) { return tokens_a_matrix <= Narrow::kTokens ? Narrow::kTokens : Wide::kTokens; }

void matmul(const MatmulArgs& args, bool mxfp4, Epilogue epilogue, int64_t tile, cudaStream_t stream) {
  mxfp4 ? start<true>(args, epilogue, tile, stream) : start<false>(args, epilogue, tile, stream);
}

}  // namespace gptoss::cuda
