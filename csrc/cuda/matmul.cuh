// What the matrix kernels for every card (matmul.cu) and those for Hopper (hopper.cu) share: a lane's weights, their decoding,
// and what is done with a finished sum.
#pragma once
#include "cuda/kernels.h"

namespace gptoss::cuda {

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

// The sums of rows r and r + 8 of a block of 16, for token i of the tile. kPacked: hidden is for hopper.cu.
template <Epilogue kEpilogue, bool kPacked = false>
__device__ __forceinline__ void finish(const MatmulArgs& a, const TokenTile& tile, int i, int64_t block, int r, float low,
                                       float high) {
  const int64_t to = a.scatter ? a.slots[tile.first + i] : tile.first + i;
  const float* bias = a.bias ? a.bias + tile.expert * a.rows : nullptr;
  if constexpr (kEpilogue == Epilogue::kSwiglu) {
    const int64_t p = block * 8 + r;
    if (p >= a.rows / 2) return;
    float gate = low + bias[2 * p], up = high + bias[2 * p + 1];
    gate = gate > a.limit ? a.limit : gate;  // a NaN stays one
    up = up > a.limit ? a.limit : up < -a.limit ? -a.limit : up;
    const float value = gate / (1.f + expf(-1.702f * gate)) * (up + 1.f);
    a.hidden.data[to * a.hidden.stride + (kPacked ? packed_place(p) : p)] = static_cast<uint16_t>(pack_bf16(value, 0.f));
  } else {
    for (int half = 0; half < 2; ++half) {
      const int64_t m = block * 16 + half * 8 + r;
      if (m >= a.rows) return;
      float value = half ? high : low;
      if (bias) value += bias[m];
      float* out = a.out + to * a.rows + m;
      *out = kEpilogue == Epilogue::kAdd ? *out + value : value;
    }
  }
}

}  // namespace gptoss::cuda
