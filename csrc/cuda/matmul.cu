// out = x W^T for bfloat16 and MXFP4 weights, with the epilogues of the model: bias, residual, rotation and cache write,
// clamped SwiGLU, weighted sum over a token's experts; for one matrix or for the experts of a batch (tiles of a list).
//
// Weights are the M operand of mma.sync, 16 rows at a time, dequantized in registers; tokens are the N operand, 8 at a time.
// Two kernels share every sum:
//   narrow, tiles of 8 tokens: a block's 8 warps share 16 rows and each takes an eighth of the inputs. Memory bound: a lane
//     reads its own weights, 16 bytes at a time, several groups of 64 inputs ahead, the first of them (where no kernel says
//     which) before the kernel that writes the inputs has ended. Inputs go through shared memory, normed there for kRope.
//   wide, tiles of 64 tokens: a block's 8 warps take 16 rows each; tokens go through shared memory, four stages deep.
// A column of an mma's result depends on that column alone, both kernels add the same products in the same order within an
// eighth of the inputs, and both add the eighths in order: so the result of a token has the same bits in either, whatever
// else is in the batch.
// MXFP4: the sum of a block of 32 inputs is multiplied by its scale, as on the CPU; codes are exact in bfloat16.
//
// Bytes: each weight once for every tile of tokens. Operations: 2 rows cols n.
#include <algorithm>

#include "cuda/matmul.cuh"
#include "cuda/norm.cuh"

namespace gptoss::cuda {
namespace {

struct Narrow {
  static constexpr int kTokens = kNarrowTile, kSlices = 8, kThreads = kSlices * kWarp;
};
struct Wide {
  static constexpr int kTokens = kWideTile, kWarps = 8, kThreads = kWarps * kWarp, kStages = 4;
};

template <bool kMxfp4>
__device__ __forceinline__ void load_codes(Group<kMxfp4>& group, const MatmulArgs& a, int block) {
  constexpr int kVectors = kMxfp4 ? 1 : 4;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const uint4* from = reinterpret_cast<const uint4*>(a.codes) + (block * kVectors * kWarp + lane);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) group.v[i] = load_once(from + i * kWarp);
}

// As arranged for a block: a word a lane of row g.
__device__ __forceinline__ const uint32_t* scales_of(const MatmulArgs& a, int block) {
  return reinterpret_cast<const uint32_t*>(a.scales) + block * 8;
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
  return a.gather ? a.slots[tile.first + i] / a.choices : tile.first + i;
}

// After a block has written its outputs, rows first .. first + n of an expert, for the tokens of its tile: for which of them it
// is the last of the token's experts, it adds all those outputs, weighted, best first, to the residual. Blocks of the same rows
// count in one row of counters: [groups of rows, tokens].
template <int kThreads>
__device__ __forceinline__ void combine(const MatmulArgs& a, const TokenTile& tile, int64_t group, int n) {
  int32_t* token_of = shared_memory<int32_t>();  // [tile], -1 where another block will come
  const int thread = static_cast<int>(threadIdx.x), k = a.choices;
  __syncthreads();
  if (thread < tile.n) {
    const int32_t token = a.slots[tile.first + thread] / k;
    token_of[thread] = comes_last(a.counters + group * a.n + token, k) ? token : -1;
  }
  __syncthreads();
  for (int at = thread; at < tile.n * n; at += kThreads) {
    const int64_t token = token_of[at / n], row = group * n + at % n;
    if (token < 0 || row >= a.rows) continue;
    float sum = 0;
    for (int j = 0; j < k; ++j) sum = fmaf(a.shares[token * k + j], a.parts[(token * k + j) * a.rows + row], sum);
    a.out[token * a.rows + row] += sum;
  }
}

// Blocks go through the tiles of tokens first, so that neighbours in time share weights.
__device__ __forceinline__ bool find_tile(TokenTile& tile, const MatmulArgs& a, int tokens, int n_tiles) {
  const int index = blockIdx.x % n_tiles;
  if (a.tiles) {
    if (index >= *a.n_tiles) return false;
    tile = a.tiles[index];
    return true;
  }
  const int64_t first = int64_t{index} * tokens;
  tile = {0, static_cast<int32_t>(first), static_cast<int32_t>(a.n - first < tokens ? a.n - first : tokens)};
  return true;
}

// A tile's inputs in shared memory: [tokens][stride]. The stride is half a line more than whole lines of 128 bytes, so that the
// lanes of one access phase (two tokens, four chunks of 16 bytes) find different banks.
__host__ __device__ constexpr int narrow_stride(int64_t cols) { return static_cast<int>(round_up(cols, 64)) + 32; }

// This warp's share of the inputs: groups begin .. end of 64.
__device__ __forceinline__ void stage_inputs(uint16_t* inputs, const MatmulArgs& a, const TokenTile& tile, int begin, int end) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, chunks = (end - begin) * 8, stride = narrow_stride(a.cols);
  const int row = lane < tile.n ? static_cast<int>(input_row(a, tile, lane)) : 0;
  for (int i = 0; i < tile.n; ++i) {
    const uint16_t* from = a.x.data + __shfl_sync(kAllLanes, row, i) * a.x.stride + begin * 64;
    for (int at = lane; at < chunks; at += kWarp) copy_async(inputs + i * stride + begin * 64 + at * 8, from + at * 8, 16);
  }
  commit_copies();
  wait_copies<0>();
  __syncwarp();
}

// The whole block norms the tile's rows of the residual stream; weight is a copy in shared memory that is on its way.
__device__ __forceinline__ void norm_inputs(uint16_t* inputs, float* sums, const MatmulArgs& a, const TokenTile& tile,
                                            const float* weight) {
  const int cols = static_cast<int>(a.cols), stride = narrow_stride(cols);
  const float* x = a.residual + tile.first * a.cols;
  square_sums<1>(sums, x, tile.n, cols);
  wait_copies<0>();
  __syncthreads();
  each_normed<1>(sums, x, tile.n, cols, weight, a.eps, [&](int row, int i, float4 value) {
    *reinterpret_cast<uint2*>(inputs + row * stride + 4 * i) = pack_bf16(value);
  });
  const int pad = (stride - 32 - cols) / 2;  // pairs of zeros up to whole groups
  for (int at = static_cast<int>(threadIdx.x); at < pad * tile.n; at += Narrow::kThreads)
    *reinterpret_cast<uint32_t*>(inputs + at / pad * stride + cols + at % pad * 2) = 0;
  __syncthreads();
}

template <bool kMxfp4, Epilogue kEpilogue>
size_t narrow_shared_bytes(int64_t tokens, int64_t cols) {
  const int64_t sums = Narrow::kSlices * 16 * Narrow::kTokens * 4, inputs = tokens * narrow_stride(cols) * 2;
  return sums + inputs + (kMxfp4 ? ceil_div(cols, 64) * 32 : 0) + (kEpilogue == Epilogue::kRope ? cols * 4 : 0);
}

// The bound on blocks of a multiprocessor is a bound on registers: 98 KB of MXFP4 or 144 KB of bfloat16 in flight hide the way
// to memory on every card.
// Shared memory: sums [slices][16 rows][8 tokens], inputs [tokens][stride], then the scales, or for kRope the norm's weights.
template <bool kMxfp4, Epilogue kEpilogue>
__global__ void __launch_bounds__(Narrow::kThreads, kMxfp4 ? 4 : 3) narrow_kernel(MatmulArgs a, int n_tiles, int tile_tokens) {
  constexpr int kAhead = kMxfp4 ? 6 : 3;  // groups whose loads are in flight: all of an eighth of 2880 inputs, or half of them
  constexpr bool kRefill = !kMxfp4;       // as each is used, not when all are
  let_next_start();
  if (a.tiles) wait_for_previous();  // which weights to read is the result of a kernel
  TokenTile tile;
  if (!find_tile(tile, a, Narrow::kTokens, n_tiles)) return;
  float* sums = shared_memory<float>();
  uint16_t* inputs = reinterpret_cast<uint16_t*>(sums + Narrow::kSlices * 16 * Narrow::kTokens);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp, g = lane / 4, c = lane % 4;
  const int groups = static_cast<int>(ceil_div(a.cols, 64)), share = (groups + Narrow::kSlices - 1) / Narrow::kSlices;
  const int begin = warp * share, end = begin + share < groups ? begin + share : groups;
  const int block = static_cast<int>(blockIdx.x) / n_tiles;
  const int base = (tile.expert * static_cast<int>(ceil_div(a.rows, 16)) + block) * groups;

  Group<kMxfp4> ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (begin + i < end) load_codes(ahead[i], a, base + begin + i);
  const int r = thread % 8, token = thread / 8;  // of the outputs this thread finishes
  if (a.bias && thread < 16 && source_row(a.order, block, thread) < a.rows)
    prefetch(a.bias + tile.expert * a.rows + source_row(a.order, block, thread));
  void* rest = inputs + tile_tokens * narrow_stride(a.cols);
  uint32_t* scales = static_cast<uint32_t*>(rest);  // [groups][8]
  float* norm_weight = static_cast<float*>(rest);   // [cols]
  if constexpr (kMxfp4) {
    for (int i = begin * 2 + lane; i < end * 2; i += kWarp) copy_async(scales + i * 4, scales_of(a, base) + i * 4, 16);
  }
  if constexpr (kEpilogue == Epilogue::kRope) {
    for (int i = thread * 4; i < a.cols; i += Narrow::kThreads * 4) copy_async(norm_weight + i, a.norm_weight + i, 16);
    commit_copies();
  }
  if (!a.tiles) wait_for_previous();

  Before before;
  if (token < tile.n) before = load_before<kEpilogue>(a, tile.first + token, block, r);
  if constexpr (kEpilogue == Epilogue::kRope)
    norm_inputs(inputs, sums, a, tile, norm_weight);
  else
    stage_inputs(inputs, a, tile, begin, end);
  // Lanes of columns without a token repeat the last one: nobody looks at their sums.
  const uint16_t* x = inputs + (g < tile.n ? g : tile.n - 1) * narrow_stride(a.cols) + 8 * c;
  FragmentC acc[1] = {{{0, 0, 0, 0}}};
  for (int first = begin; first < end; first += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= end) break;
      if constexpr (kMxfp4) ahead[i].scales = scales[(first + i) * 8 + g];
      multiply<kMxfp4>(acc, ahead[i],
                       [&](int, int b) { return *reinterpret_cast<const uint4*>(x + (first + i) * 64 + b * 32); });
      if (kRefill && first + i + kAhead < end) load_codes(ahead[i], a, base + first + i + kAhead);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (!kRefill && first + i + kAhead < end) load_codes(ahead[i], a, base + first + i + kAhead);
  }
  Bias bias;
  if (token < tile.n) bias = load_bias(a, tile.expert, block, r);
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[(warp * 16 + g + i / 2 * 8) * 8 + 2 * c + i % 2] = acc[0].v[i];
  __syncthreads();
  if (token < tile.n) {
    float low = 0, high = 0;
    for (int s = 0; s < Narrow::kSlices; ++s) {
      low += sums[(s * 16 + r) * 8 + token];
      high += sums[(s * 16 + r + 8) * 8 + token];
    }
    finish<kEpilogue>(a, tile, token, block, r, bias, before, low, high);
  }
  if constexpr (kEpilogue == Epilogue::kCombine) combine<Narrow::kThreads>(a, tile, block, 16);
}

// Stage s holds 64 inputs of 64 tokens: [token][8 chunks of 16 bytes], a token's chunks in the other order of halves where it
// is odd, so that the 8 lanes of one access phase (two tokens, four chunks) find different banks.
__device__ __forceinline__ int chunk_at(int token, int chunk) { return token * 8 + (chunk ^ (token % 2 * 4)); }

template <bool kMxfp4, Epilogue kEpilogue>
__global__ void __launch_bounds__(Wide::kThreads) wide_kernel(MatmulArgs a, int n_tiles) {
  let_next_start();
  if (a.tiles) wait_for_previous();  // which weights to read is the result of a kernel
  constexpr int kTiles = Wide::kTokens / 8, kChunks = Wide::kTokens * 8, kStages = Wide::kStages;
  uint4* stages = shared_memory<uint4>();  // [stages][tokens][8]
  TokenTile tile;
  if (!find_tile(tile, a, Wide::kTokens, n_tiles)) return;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, g = thread % kWarp / 4, c = thread % 4;
  const int64_t blocks = ceil_div(a.rows, 16), groups = ceil_div(a.cols, 64), share = ceil_div(groups, Narrow::kSlices);
  const int block = static_cast<int>(blockIdx.x) / n_tiles * Wide::kWarps + warp;
  const int base = static_cast<int>((tile.expert * blocks + block) * groups);
  const bool has_rows = block < blocks;
  Group<kMxfp4> next{};
  const auto load_next = [&](int at) {
    load_codes(next, a, at);
    if (kMxfp4) next.scales = scales_of(a, at)[g];
  };
  Bias bias;
  if (has_rows) {
    load_next(base);
    bias = load_bias(a, tile.expert, block, g);
  }
  if (!a.tiles) wait_for_previous();

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
  for (int64_t group = 0; group < groups; ++group) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the group is there for all, and all are done with the stage that is filled next
    fetch(group + kStages - 1);
    if (!has_rows) continue;
    const Group<kMxfp4> weights = next;
    if (group + 1 < groups) load_next(base + static_cast<int>(group) + 1);
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
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = t * 8 + 2 * c + i;
      if (!has_rows || token >= tile.n) continue;
      const Before before = load_before<kEpilogue>(a, tile.first + token, block, g);
      finish<kEpilogue>(a, tile, token, block, g, bias, before, total[t].v[i], total[t].v[2 + i]);
    }
  }
  if constexpr (kEpilogue == Epilogue::kCombine) combine<Wide::kThreads>(a, tile, blockIdx.x / n_tiles, Wide::kWarps * 16);
}

template <bool kMxfp4, Epilogue kEpilogue>
void start(const MatmulArgs& a, int64_t tile, cudaStream_t stream) {
  const int64_t n_tiles = a.tiles ? a.max_tiles : ceil_div(a.n, tile), blocks = ceil_div(a.rows, 16);
  const bool narrow = tile == Narrow::kTokens;
  const int64_t grid = n_tiles * (narrow ? blocks : ceil_div(blocks, Wide::kWarps));
  CHECK(grid < int64_t{1} << 31, "a product of ", a.rows, " outputs and ", a.n, " tokens is too large for one launch");
  Launch l{dim3(static_cast<unsigned>(grid)), dim3(narrow ? Narrow::kThreads : Wide::kThreads), 0, stream};
  if (narrow) {
    const int tokens = static_cast<int>(std::min<int64_t>(a.n, tile));
    l.shared_bytes = narrow_shared_bytes<kMxfp4, kEpilogue>(tokens, a.cols);
    launch(l, narrow_kernel<kMxfp4, kEpilogue>, a, static_cast<int>(n_tiles), tokens);
  } else {
    l.shared_bytes = Wide::kStages * Wide::kTokens * 64 * sizeof(uint16_t);
    launch(l, wide_kernel<kMxfp4, kEpilogue>, a, static_cast<int>(n_tiles));
  }
}

}  // namespace

// Both give the same bits, so inputs that are too many for the shared memory that every card has go the other way.
int64_t matmul_tile(int64_t tokens_a_matrix, int64_t cols) {
  constexpr size_t kShared = 99 << 10;
  const bool fits = narrow_shared_bytes<false, Epilogue::kRope>(Narrow::kTokens, cols) <= kShared;
  return tokens_a_matrix <= Narrow::kTokens && fits ? Narrow::kTokens : Wide::kTokens;
}

int64_t combine_counters(int64_t n, int64_t rows, int64_t tile) {
  return n * ceil_div(rows, tile == Narrow::kTokens ? 16 : Wide::kWarps * 16);
}

void matmul(const MatmulArgs& args, bool mxfp4, Epilogue epilogue, int64_t tile, cudaStream_t stream) {
  check_epilogue(epilogue, mxfp4);
  switch (epilogue) {
    case Epilogue::kStore:
      return mxfp4 ? start<true, Epilogue::kStore>(args, tile, stream) : start<false, Epilogue::kStore>(args, tile, stream);
    case Epilogue::kAdd:
      return start<false, Epilogue::kAdd>(args, tile, stream);
    case Epilogue::kSwiglu:
      return start<true, Epilogue::kSwiglu>(args, tile, stream);
    case Epilogue::kRope:
      return start<false, Epilogue::kRope>(args, tile, stream);
    case Epilogue::kCombine:
      return start<true, Epilogue::kCombine>(args, tile, stream);
  }
}

}  // namespace gptoss::cuda
