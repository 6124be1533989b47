// bfloat16 as it is stored: the upper 16 bits of a float32.
#pragma once
#include <bit>
#include <cstdint>

namespace gptoss {

using bf16 = uint16_t;

inline float bf16_to_float(bf16 value) { return std::bit_cast<float>(uint32_t{value} << 16); }

}  // namespace gptoss
