// MXFP4 (OCP Microscaling Formats v1.0, section 5): blocks of 32 values along the input dimension.
//   byte j of a block's 16 holds elements 2j (low nibble) and 2j+1 (high nibble), each an E2M1 code:
//   sign, two exponent bits, one mantissa bit: 0 .5 1 1.5 2 3 4 6 and their negatives;
//   one scale byte a block: 2^(byte - 127). Byte 255, NaN in the standard, acts as 2^128 here, as ldexp has it in the
//   model's reference code: it can only give infinities and NaN, never a wrong finite number.
// A code is exact in bfloat16, and so is code x scale; the kernels multiply the float32 sum of a block by its scale.
#pragma once
#include <cstdint>

namespace gptoss {

inline constexpr int64_t kMxBlock = 32;       // values that share a scale
inline constexpr int64_t kMxBlockBytes = 16;  // their codes

}  // namespace gptoss
