// What the matrix kernels for every card (matmul.cu) and those for Hopper (hopper.cu) share: a lane's weights, their decoding,
// and what is done with a finished sum.
#pragma once
#include "cuda/rope.cuh"

namespace gptoss::cuda {

inline void check_epilogue(Epilogue epilogue, bool mxfp4) {
  const bool bf16 = epilogue == Epilogue::kAdd || epilogue == Epilogue::kRope;
  CHECK(epilogue == Epilogue::kStore || mxfp4 != bf16, "no product of ", mxfp4 ? "MXFP4" : "bfloat16",
        " weights ends like this");
}

// One lane's weights of 16 rows x 64 inputs.
template <bool kMxfp4>
struct Group {
  uint4 v[kMxfp4 ? 1 : 4];
  uint32_t scales;
};

// 2^(byte - 127); 255 gives infinity.
__device__ __forceinline__ float scale_of(uint32_t scales, int byte) {
  const uint32_t exponent = scales >> 8 * byte & 255;
  return __uint_as_float(exponent ? exponent << 23 : 0x00400000u);
}

// 2^(byte - 127) twice, as bfloat16; 255 gives infinity.
__device__ __forceinline__ uint32_t scale_pair(uint32_t scales, int byte) {
  const uint32_t pair = (scales >> 8 * byte & 255) * 0x00800080u;
  return pair > 0x00400040u ? pair : 0x00400040u;
}

// A word of 8 codes (weights.cu) to 4 pairs of bfloat16, times `unit`: a pair of powers of two, given times 2^126.
__device__ __forceinline__ void decode(uint32_t (&pairs)[4], uint32_t word, uint32_t unit = 0x7e807e80u) {
  constexpr uint32_t kSigns = 0x80008000u, kValues = 0x01c001c0u, kBoth = kSigns | kValues;
  pairs[0] = word & kBoth;
  pairs[1] = word << 3 & kBoth;
  pairs[2] = (word << 6 & kValues) | (word << 1 & kSigns);
  pairs[3] = (word >> 3 & kValues) | (word << 2 & kSigns);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = multiply_bf16(pairs[i], unit);
}

// Where input i of an operand is in a row that hopper.cu multiplies (see there).
__device__ __forceinline__ int64_t packed_place(int64_t i) {
  return (i & ~int64_t{31}) + i % 8 / 4 * 16 + i % 4 / 2 * 8 + i % 32 / 8 * 2 + i % 2;
}

// What the outputs of rows r and r + 8 of a block of 16 need besides their sums. Loaded before the sums are there, which hides
// the way to memory.
struct Bias {
  float low = 0, high = 0;
};
__device__ __forceinline__ Bias load_bias(const MatmulArgs& a, int expert, int block, int r) {
  const int low = source_row(a.order, block, r), high = source_row(a.order, block, r + 8);
  const float* bias = a.bias + int64_t{expert} * a.rows;
  return {a.bias && low < a.rows ? bias[low] : 0.f, a.bias && high < a.rows ? bias[high] : 0.f};
}

// The same of one token; what a kernel before this one wrote.
struct Before {
  float low = 0, high = 0;  // kAdd: the residual
  RopePlace place{};        // kRope
};
template <Epilogue kEpilogue>
__device__ __forceinline__ Before load_before(const MatmulArgs& a, int token, int block, int r) {
  Before before;
  if constexpr (kEpilogue == Epilogue::kAdd) {
    const int low = source_row(a.order, block, r), high = source_row(a.order, block, r + 8);
    if (low < a.rows) before.low = a.out[int64_t{token} * a.rows + low];
    if (high < a.rows) before.high = a.out[int64_t{token} * a.rows + high];
  } else if constexpr (kEpilogue == Epilogue::kRope) {
    before.place = find_place(a.rope, token, block % 4 * 8 + r);
  }
  return before;
}

// The sums of rows r and r + 8 of a block of 16, for token i of the tile. kPacked: hidden is for hopper.cu.
template <Epilogue kEpilogue, bool kPacked = false>
__device__ __forceinline__ void finish(const MatmulArgs& a, const TokenTile& tile, int i, int block, int r, Bias bias,
                                       const Before& before, float low, float high) {
  low += bias.low;
  high += bias.high;
  if constexpr (kEpilogue == Epilogue::kSwiglu) {
    const int p = block * 8 + r;
    if (p >= a.rows / 2) return;
    const float gate = low > a.limit ? a.limit : low;  // a NaN stays one
    const float up = high > a.limit ? a.limit : high < -a.limit ? -a.limit : high;
    const float value = gate / (1.f + expf(-1.702f * gate)) * (up + 1.f);
    a.hidden.data[(tile.first + i) * a.hidden.stride + (kPacked ? packed_place(p) : p)] =
        static_cast<uint16_t>(pack_bf16(value, 0.f));
  } else if constexpr (kEpilogue == Epilogue::kRope) {
    const int head = block / 4, pair = block % 4 * 8 + r;
    append_pair(a.rope, before.place, tile.first + i, head, pair, low, high);
  } else {
    const int low_row = source_row(a.order, block, r), high_row = source_row(a.order, block, r + 8);
    float* out =
        kEpilogue == Epilogue::kCombine ? a.parts + a.slots[tile.first + i] * a.rows : a.out + (tile.first + i) * a.rows;
    if (low_row < a.rows) out[low_row] = kEpilogue == Epilogue::kAdd ? before.low + low : low;
    if (high_row < a.rows) out[high_row] = kEpilogue == Epilogue::kAdd ? before.high + high : high;
  }
}

}  // namespace gptoss::cuda
