// Random words for benchmarks.
#pragma once
#include <cstdint>

namespace gptoss::bench {

inline uint64_t next_random(uint64_t& state) {  // xorshift64*
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545F4914F6CDD1D;
}

// Random words keep the bits of `mask`, and `base` is added: values that a forward pass stays finite with.
struct RandomBits {
  uint64_t mask, base;
};
inline constexpr RandomBits kRandomCodes = {~uint64_t{0}, 0};                          // every FP4 code
inline constexpr RandomBits kRandomScales = {0x0101010101010101, 0x7878787878787878};  // 2^-7 or 2^-6
inline constexpr RandomBits kRandomBf16 = {0x81FF81FF81FF81FF, 0x3B803B803B803B80};    // +-2^-8 to 2^-4

}  // namespace gptoss::bench
