// out = x W^T for many tokens on Hopper (sm_90a): bfloat16 and MXFP4 weights, one matrix or the experts of a batch, with the
// epilogues of matmul.cu.
//
// Weights are the M operand of wgmma and come from registers: in the arrangement of weights.cu a warp's 16 rows x 64 inputs are
// its fragments, 16 bytes a lane. MXFP4 codes are multiplied by their scale there: code x 2^(byte - 127) / 4 is exact in
// bfloat16 for every code and every byte up to 254 (the 1/4 keeps 6 x 2^127 finite; sums are multiplied by 4 at the end), and
// 255 is infinite. One float32 sum then goes over all inputs.
//
// Tokens are the N operand, from shared memory. The arrangement takes the inputs of a block of 32 in another order than they
// lie: lane c of a row has 8c .. 8c+7, product j of 16 takes 8c+4j .. +3. So tokens are packed beforehand, with input
// 8c+4j+2h+e at place 16j+8h+2c+e of its 32, rows in the order of the experts' slots; the copy engine then brings boxes of 32
// tokens x 64 inputs. SwiGLU's output is written packed, for the product that follows.
//
// A block is two warpgroups that multiply and one that copies (one thread of it). It takes tiles of 2 x `units` x 64 rows and
// up to 128 tokens, one after the other, as many blocks as the card has multiprocessors: so tokens of the next tile arrive
// while the last one's sums are written. Tokens go through a ring of stages of 64 inputs; `full` counts a stage's bytes,
// `empty` the warps that are done with it. A warpgroup decodes 64 x 64 weights while its products of the 64 x 64 before run.
//
// The order of a sum is the tensor core's own, over all inputs, not the eighths of matmul.cu: a token's bits here differ from
// those there, so they depend on how many tokens share the batch. BackendOptions::invariant switches this path off.
//
// The down product leaves each expert's outputs in memory; a kernel after it adds a token's, weighted, to the residual.
//
// Bytes: weights once a tile of tokens, tokens once a tile of rows, both mostly from the second-level cache. Operations: 2 rows
// cols n.
#include "cuda/hopper.cuh"

#include <algorithm>

#include "cuda/matmul.cuh"

namespace gptoss::cuda {

struct Hopper {
  // Fewer tokens than these are left to matmul.cu: of one matrix; of each expert's on average.
  static constexpr int kMinTokens = 65, kMinTokensOfExpert = 33;
  static constexpr int kTokens = kHopperTokens, kBoxTokens = 32;
  static constexpr int kStages = 8, kStageBytes = kTokens * kBoxColumns * 2, kBoxBytes = kBoxTokens * kBoxColumns * 2;
  static constexpr int kGroups = 2, kWarps = kGroups * 4, kThreads = (kGroups + 1) * 128;  // warpgroups that multiply; + 1
  static constexpr int kUnitRows = 64, kMaxUnits = 2;  // a warpgroup's, each the M of a wgmma
  static constexpr int kFetchAhead = 6;                // groups of 64 inputs that weights are brought to the cache before
  // A warp's sums on their way out: [16 rows][tokens], rows 8 banks apart.
  static constexpr int kPitch = kTokens + 8, kSumsBytes = 16 * kPitch * 4;
  static constexpr int kAlign = 1024;  // of stages: the period of the swizzle
  static constexpr int kSharedBytes = kAlign + kStages * (kStageBytes + 2 * kBarrierBytes) + kWarps * kSumsBytes;
  // 65536 registers: 128 x 24 + 256 x 240 are 64512.
  static constexpr int kCopyRegisters = 24, kMultiplyRegisters = 240;
};

namespace {

// How a product is cut into tiles.
struct Cut {
  int units;           // of 64 rows, a warpgroup's in a tile
  int row_tiles;       // of 2 x units x 64 rows
  int tokens;          // of a tile, where there is no list of tiles
  int token_tiles;     // then
  bool rows_are_next;  // neighbours in time share tokens; else they share weights
};

struct Place {
  TokenTile tokens;
  int row_tile;
};

__device__ __forceinline__ int tile_count(const MatmulArgs& a, const Cut& cut) {
  return cut.row_tiles * (a.tiles ? *a.n_tiles : cut.token_tiles);
}

__device__ __forceinline__ Place place_of(const MatmulArgs& a, const Cut& cut, int index, int count) {
  const int token_tiles = count / cut.row_tiles;
  const int row = cut.rows_are_next ? index % cut.row_tiles : index / token_tiles;
  const int token = cut.rows_are_next ? index / cut.row_tiles : index % token_tiles;
  if (a.tiles) return {a.tiles[token], row};
  const int first = token * cut.tokens, left = static_cast<int>(a.n) - first;
  return {{0, first, left < cut.tokens ? left : cut.tokens}, row};
}

constexpr int kSums = Hopper::kTokens / 2;  // a lane's of 64 rows

// The stages and their barriers, by shared address, and how many stages have been used.
struct Ring {
  uint32_t stages, barriers, used = 0;

  __device__ __forceinline__ uint32_t stage(uint32_t i) const { return stages + i % Hopper::kStages * Hopper::kStageBytes; }
  __device__ __forceinline__ uint32_t full(uint32_t i) const { return barriers + i % Hopper::kStages * kBarrierBytes; }
  __device__ __forceinline__ uint32_t empty(uint32_t i) const { return full(i) + Hopper::kStages * kBarrierBytes; }
  __device__ __forceinline__ static uint32_t parity(uint32_t i) { return i / Hopper::kStages % 2; }
};

__device__ void copy_tiles(const MatmulArgs& a, const Cut& cut, const TensorMap* x, Ring ring) {
  let_copies_read_global();  // the rows were written by ordinary stores of the kernels before
  const int groups = static_cast<int>(ceil_div(a.cols, 64)), count = tile_count(a, cut);
  for (int index = static_cast<int>(blockIdx.x); index < count; index += static_cast<int>(gridDim.x)) {
    const TokenTile tile = place_of(a, cut, index, count).tokens;
    const int boxes = (tile.n + Hopper::kBoxTokens - 1) / Hopper::kBoxTokens;
    for (int group = 0; group < groups; ++group, ++ring.used) {
      const uint32_t stage = ring.stage(ring.used), full = ring.full(ring.used);
      wait_phase(ring.empty(ring.used), Ring::parity(ring.used) ^ 1);
      arrive_expecting(full, boxes * Hopper::kBoxBytes);
      for (int b = 0; b < boxes; ++b)
        load_box(stage + b * Hopper::kBoxBytes, x, group * kBoxColumns, tile.first + b * Hopper::kBoxTokens, full);
    }
  }
}

// Where a lane reads its weights of 16 rows, group after group.
template <bool kMxfp4>
struct Source {
  static constexpr int kVectors = kMxfp4 ? 1 : 4;
  const uint4* codes;
  const uint32_t* scales;

  __device__ __forceinline__ Source(const MatmulArgs& a, int64_t block) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    codes = reinterpret_cast<const uint4*>(a.codes) + block * kVectors * kWarp + lane;
    scales = reinterpret_cast<const uint32_t*>(a.scales) + block * 8 + lane / 4;
  }
  __device__ __forceinline__ Group<kMxfp4> load() const {
    Group<kMxfp4> group;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) group.v[i] = load_once(codes + i * kWarp);
    group.scales = kMxfp4 ? *scales : 0;
    return group;
  }
  __device__ __forceinline__ void advance(int groups) {
    codes += groups * kVectors * kWarp;
    scales += groups * 8;
  }
  // Starts bringing the weights so many groups further on to the second-level cache.
  __device__ __forceinline__ void fetch(int groups) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) prefetch(codes + (groups * kVectors + i) * kWarp);
    if (kMxfp4) prefetch(scales + groups * 8);
  }
};

// A lane's weights to the A fragments of four products of 16 inputs; MXFP4 divided by 4.
template <bool kMxfp4>
__device__ __forceinline__ void make_fragments(uint32_t (&fragments)[4][4], const Group<kMxfp4>& group) {
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    uint32_t low[4], high[4];
    if constexpr (kMxfp4) {
      constexpr uint32_t kTwoTo124 = 0x7d807d80u;
      decode(low, b ? group.v[0].z : group.v[0].x, kTwoTo124);
      decode(high, b ? group.v[0].w : group.v[0].y, kTwoTo124);
      const uint32_t low_scale = scale_pair(group.scales, b), high_scale = scale_pair(group.scales, 2 + b);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low[i] = multiply_bf16(low[i], low_scale);
        high[i] = multiply_bf16(high[i], high_scale);
      }
    } else {
      const uint4 r0 = group.v[2 * b], r8 = group.v[2 * b + 1];
      low[0] = r0.x, low[1] = r0.y, low[2] = r0.z, low[3] = r0.w;
      high[0] = r8.x, high[1] = r8.y, high[2] = r8.z, high[3] = r8.w;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t (&to)[4] = fragments[2 * b + j];
      to[0] = low[2 * j], to[1] = high[2 * j], to[2] = low[2 * j + 1], to[3] = high[2 * j + 1];
    }
  }
}

// acc += 64 rows x 64 inputs of fragments x kN tokens of a stage; a group of products.
template <int kN>
__device__ __forceinline__ void multiply(float (&acc)[kSums], const uint32_t (&fragments)[4][4], uint32_t stage) {
  wgmma_fence();  // the fragments have been written, and at first the sums
#pragma unroll
  for (int s = 0; s < 4; ++s) wgmma<kN>(acc, fragments[s], operand_b(stage, s));
  wgmma_commit();
}

// A warp's 16 rows of a unit, through its part of shared memory, so that finish() is written once and not for every sum.
template <bool kMxfp4, Epilogue kEpilogue>
__device__ __forceinline__ void write_sums(const MatmulArgs& a, const TokenTile& tile, int block, float* sums,
                                           const float (&acc)[kSums]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, c = lane % 4;
  __syncwarp();  // the unit before has been read
#pragma unroll
  for (int t = 0; t < kSums / 4; ++t) {
    *reinterpret_cast<float2*>(sums + g * Hopper::kPitch + 8 * t + 2 * c) = float2{acc[4 * t], acc[4 * t + 1]};
    *reinterpret_cast<float2*>(sums + (g + 8) * Hopper::kPitch + 8 * t + 2 * c) = float2{acc[4 * t + 2], acc[4 * t + 3]};
  }
  __syncwarp();
  constexpr float kTimes = kMxfp4 ? 4.f : 1.f;
  const int r = lane % 8;
  const Bias bias = load_bias(a, tile.expert, block, r);
#pragma unroll 4
  for (int i = lane / 8; i < tile.n; i += kWarp / 8) {
    const Before before = load_before<kEpilogue>(a, tile.first + i, block, r);
    finish<kEpilogue, true>(a, tile, i, block, r, bias, before, kTimes * sums[r * Hopper::kPitch + i],
                            kTimes * sums[(r + 8) * Hopper::kPitch + i]);
  }
}

// The rows of a warpgroup, 64 `units` of them from row 64 `unit` on; the ring's next stages. Two groups of products take turns:
// while one runs, the fragments of the other are made. They are two units with the same inputs, or with one unit even and odd
// stages, added at the end.
template <bool kMxfp4, Epilogue kEpilogue>
__device__ __forceinline__ void multiply_tile(const MatmulArgs& a, const TokenTile& tile, int unit, int units, const Ring& ring,
                                              float* sums) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp % 4, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int groups = static_cast<int>(ceil_div(a.cols, 64)), step = 3 - units;  // stages a turn
  const int64_t blocks = ceil_div(a.rows, 16);
  const auto first_weights = [&](int m) -> Source<kMxfp4> {
    const int64_t block = (unit + (units == 2 ? m : 0)) * 4 + warp;  // past the end: the last one, and nothing is written
    return {a, (tile.expert * blocks + (block < blocks ? block : blocks - 1)) * groups + (units == 2 || groups == 1 ? 0 : m)};
  };
  Source<kMxfp4> source[2] = {first_weights(0), first_weights(1)};
  Group<kMxfp4> ahead[2];
  float acc[2][kSums];
  uint32_t fragments[2][4][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    ahead[m] = source[m].load();
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[m][i] = 0;
  }
  for (int first = 0; first < groups; first += step) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int group = first + (units == 2 ? 0 : m);
      if (group < groups) {
        const uint32_t stage = ring.used + group;
        if (units == 1 || m == 0) wait_phase(ring.full(stage), Ring::parity(stage));
        wgmma_wait<1>();  // the products that read these fragments a turn ago have ended: only then may they be written
        if ((units == 1 || m == 1) && group >= step && lane == 0) arrive(ring.empty(stage - step));
        make_fragments<kMxfp4>(fragments[m], ahead[m]);
        if (group + step < groups) {
          source[m].advance(step);
          ahead[m] = source[m].load();
        }
        if (group + step + Hopper::kFetchAhead < groups) source[m].fetch(Hopper::kFetchAhead);
        if (tile.n > 96)
          multiply<128>(acc[m], fragments[m], ring.stage(stage));
        else if (tile.n > 64)
          multiply<96>(acc[m], fragments[m], ring.stage(stage));
        else if (tile.n > 32)
          multiply<64>(acc[m], fragments[m], ring.stage(stage));
        else
          multiply<32>(acc[m], fragments[m], ring.stage(stage));
      }
    }
  }
  wgmma_wait<0>();
#pragma unroll
  for (int m = 0; m < 2; ++m) settle(acc[m]);
  for (int last = groups < step ? 0 : groups - step; last < groups; ++last)
    if (lane == 0) arrive(ring.empty(ring.used + last));
  if (units == 1) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[0][i] += acc[1][i];
  }
  write_sums<kMxfp4, kEpilogue>(a, tile, unit * 4 + warp, sums, acc[0]);
  if (units == 2) write_sums<kMxfp4, kEpilogue>(a, tile, (unit + 1) * 4 + warp, sums, acc[1]);
}

template <bool kMxfp4, Epilogue kEpilogue>
__device__ __forceinline__ void multiply_tiles(const MatmulArgs& a, const Cut& cut, Ring ring, float* sums) {
  const int group = same(static_cast<int>(threadIdx.x) / 128), count = same(tile_count(a, cut));
  const int inputs = static_cast<int>(ceil_div(a.cols, 64)), units = static_cast<int>(ceil_div(a.rows, Hopper::kUnitRows));
  for (int index = static_cast<int>(blockIdx.x); index < count; index += static_cast<int>(gridDim.x)) {
    Place place = place_of(a, cut, index, count);
    place.tokens.n = same(place.tokens.n);
    const int unit = (place.row_tile * Hopper::kGroups + group) * cut.units, left = units - unit;
    if (left > 0) {
      multiply_tile<kMxfp4, kEpilogue>(a, place.tokens, unit, left < cut.units ? left : cut.units, ring, sums);
    } else {  // the stages pass
      for (int i = 0; i < inputs; ++i) {
        wait_phase(ring.full(ring.used + i), Ring::parity(ring.used + i));
        __syncwarp();  // no lane may still wait for a phase when the next but one begins
        if (threadIdx.x % kWarp == 0) arrive(ring.empty(ring.used + i));
      }
    }
    ring.used += inputs;
  }
}

#if defined(GPTOSS_CUDA_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasInstructions = true;
#else
constexpr bool kHasInstructions = false;  // of the card that this is being compiled for
#endif

template <bool kMxfp4, Epilogue kEpilogue>
__global__ void __launch_bounds__(Hopper::kThreads, 1)
    hopper_kernel(MatmulArgs a, Cut cut, const __grid_constant__ TensorMap x) {
  if constexpr (kHasInstructions) {
    unsigned char* shared = shared_memory<unsigned char>();
    shared += (Hopper::kAlign - shared_address(shared) % Hopper::kAlign) % Hopper::kAlign;
    float* sums = reinterpret_cast<float*>(shared + Hopper::kStages * Hopper::kStageBytes);
    Ring ring;
    ring.stages = shared_address(shared);
    ring.barriers = shared_address(sums) + Hopper::kWarps * Hopper::kSumsBytes;
    if (threadIdx.x == 0) {
      prefetch_tensor_map(&x);
      for (uint32_t i = 0; i < Hopper::kStages; ++i) {
        init_barrier(ring.full(i), 1);
        init_barrier(ring.empty(i), Hopper::kWarps);
      }
      publish_barriers();
    }
    __syncthreads();
    wait_for_previous();
    let_next_start();
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    if (warp >= Hopper::kWarps) {
      shrink_registers<Hopper::kCopyRegisters>();
      if (threadIdx.x == Hopper::kWarps * kWarp) copy_tiles(a, cut, &x, ring);
    } else {
      grow_registers<Hopper::kMultiplyRegisters>();
      multiply_tiles<kMxfp4, kEpilogue>(a, cut, ring, sums + warp * (Hopper::kSumsBytes / 4));
    }
  } else {
    wait_for_previous();
    stop_kernel();  // the backend does not come here
  }
}

constexpr int kPackThreads = 128;

// A block a row; a thread 8 inputs of the result at a time, as pairs: pair 4 i + c of a block of 32 comes from pair 4 c + i.
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(Rounded packed, Rounded x, const int32_t* slots, int32_t gather, const int32_t* n_rows) {
  let_next_start();
  wait_for_previous();
  const int64_t row = blockIdx.x;
  if (gather && n_rows && row >= int64_t{*n_rows} * gather) return;
  const int64_t source = gather ? slots[row] / gather : row;
  const uint32_t* in = reinterpret_cast<const uint32_t*>(x.data + source * x.stride);
  uint4* out = reinterpret_cast<uint4*>(packed.data + row * packed.stride);
  for (int64_t v = threadIdx.x; v < packed.stride / 8; v += kPackThreads) {
    const uint32_t* pairs = in + v / 4 * 16 + v % 4;
    out[v] = {pairs[0], pairs[4], pairs[8], pairs[12]};
  }
}

constexpr int kCombineThreads = 256;

// The experts' outputs, weighted, best first, onto the residual. A block a token, a thread 4 outputs at a time.
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(MatmulArgs a) {
  let_next_start();
  wait_for_previous();
  const int64_t token = blockIdx.x, quads = a.rows / 4;
  if (a.n_rows && token >= *a.n_rows) return;
  const float4* parts = reinterpret_cast<const float4*>(a.parts) + token * a.choices * quads;
  float4* out = reinterpret_cast<float4*>(a.out) + token * quads;
  for (int64_t i = threadIdx.x; i < quads; i += kCombineThreads) {
    float4 sum = {0, 0, 0, 0};
    for (int j = 0; j < a.choices; ++j) {
      const float share = a.shares[token * a.choices + j];
      const float4 part = parts[j * quads + i];
      sum = {fmaf(share, part.x, sum.x), fmaf(share, part.y, sum.y), fmaf(share, part.z, sum.z), fmaf(share, part.w, sum.w)};
    }
    const float4 before = out[i];
    out[i] = {before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w};
  }
}

// The cut that leaves the fewest multiprocessors idle in its last round; of large tiles first, which load less.
Cut choose_cut(const MatmulArgs& a, bool mxfp4, int multiprocessors) {
  constexpr int64_t kOverhead = 32;  // what a tile costs whatever its tokens (weights, decoding), as so many tokens more
  Cut best{};
  int64_t least = 0;
  for (int units = Hopper::kMaxUnits; units > 0; --units) {
    for (int tokens = Hopper::kTokens; tokens > 0; tokens -= Hopper::kBoxTokens) {
      const int64_t row_tiles = ceil_div(a.rows, Hopper::kGroups * units * Hopper::kUnitRows);
      const int64_t token_tiles = a.tiles ? a.max_tiles : ceil_div(a.n, tokens);
      const int64_t cost = ceil_div(row_tiles * token_tiles, multiprocessors) * units * (tokens + kOverhead);
      CHECK(row_tiles * token_tiles < int64_t{1} << 30, "a product of ", a.rows, " outputs and ", a.n, " tokens is too large");
      if (best.units == 0 || cost < least) {
        best = {units, static_cast<int>(row_tiles), tokens, static_cast<int>(token_tiles), false};
        least = cost;
      }
      if (a.tiles) break;  // cut already, into tiles of kTokens
    }
  }
  // The smaller operand is gone through again and again, and stays in the second-level cache. Of an expert it is its weights.
  const int64_t weight_bytes = a.rows * a.cols * (mxfp4 ? 17 : 64) / 32;
  best.rows_are_next = a.tiles || weight_bytes < a.n * a.cols * 2;
  return best;
}

template <bool kMxfp4, Epilogue kEpilogue>
void start(const MatmulArgs& a, int multiprocessors, cudaStream_t stream) {
  const Cut cut = choose_cut(a, kMxfp4, multiprocessors);
  const int64_t tiles = int64_t{cut.row_tiles} * cut.token_tiles, inputs = a.tiles ? a.n * a.choices : a.n;
  const Launch l{dim3(static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors))), dim3(Hopper::kThreads),
                 Hopper::kSharedBytes, stream};
  launch(l, hopper_kernel<kMxfp4, kEpilogue>, a, cut, make_tensor_map(a.x.data, inputs, a.x.stride, Hopper::kBoxTokens));
}

}  // namespace

bool hopper_pays(int64_t tokens, int64_t matrices) {
  return tokens >= (matrices == 1 ? int64_t{Hopper::kMinTokens} : matrices * Hopper::kMinTokensOfExpert);
}

void hopper_pack(Rounded packed, Rounded x, const int32_t* slots, int32_t gather, const int32_t* n_rows, int64_t n,
                 cudaStream_t stream) {
  launch({dim3(static_cast<unsigned>(n)), dim3(kPackThreads), 0, stream}, pack_kernel, packed, x, slots, gather, n_rows);
}

void hopper_matmul(const MatmulArgs& args, bool mxfp4, Epilogue epilogue, int multiprocessors, cudaStream_t stream) {
  check_epilogue(epilogue, mxfp4);
  switch (epilogue) {
    case Epilogue::kStore:
      return mxfp4 ? start<true, Epilogue::kStore>(args, multiprocessors, stream)
                   : start<false, Epilogue::kStore>(args, multiprocessors, stream);
    case Epilogue::kAdd:
      return start<false, Epilogue::kAdd>(args, multiprocessors, stream);
    case Epilogue::kSwiglu:
      return start<true, Epilogue::kSwiglu>(args, multiprocessors, stream);
    case Epilogue::kRope:
      return start<false, Epilogue::kRope>(args, multiprocessors, stream);
    case Epilogue::kCombine:
      start<true, Epilogue::kCombine>(args, multiprocessors, stream);
      launch({dim3(static_cast<unsigned>(args.n)), dim3(kCombineThreads), 0, stream}, combine_kernel, args);
  }
}

}  // namespace gptoss::cuda
