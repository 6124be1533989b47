// Sixteen float32 lanes, and pairs of bfloat16 beside each other in sixteen lanes, in the terms of one instruction set.
//
//   F32       16 float32
//   Weights   one bfloat16 pair of inputs for each of 16 output rows
//   Tokens    one pair of inputs of one token, in every lane
//   dot2      acc + w.even * t.even + w.odd * t.odd, lane by lane
//   kTile     tokens whose sums fit in registers; halves(tokens): times 16 rows, or 32
//
// The sets round differently among themselves (fused or not); within a set every path uses these same operations in the
// same order. Compiled with -ffp-contract=off, so nothing is fused that is not written as fma.
#pragma once
#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

#if defined(__AVX512BW__)
// ------------------------------------------------------------------------------------------------------ AVX-512
using F32 = __m512;
using Mask = __mmask16;

INLINE F32 zero() { return _mm512_setzero_ps(); }
INLINE F32 set1(float x) { return _mm512_set1_ps(x); }
INLINE F32 load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
INLINE F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
INLINE F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
INLINE F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
INLINE F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
// NaN in b comes through.
INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
INLINE F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
INLINE Mask less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE F32 select(Mask m, F32 yes, F32 no) { return _mm512_mask_blend_ps(m, no, yes); }
INLINE F32 round_nearest(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for n a whole number in [-126, 127]
INLINE F32 scale_by_power(F32 x, F32 n) { return _mm512_scalef_ps(x, n); }
INLINE F32 load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
// To the nearest bfloat16, ties to even; NaN stays NaN.
INLINE F32 round_bf16(F32 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
  return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32((int)0xFFFF0000)));
}
INLINE void store_bf16(uint16_t* p, F32 x) {
  const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(round_bf16(x)), 16);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(high));
}
// 16 pairs: the first number of each, the second of each.
INLINE void load_bf16_pairs(F32& first, F32& second, const uint16_t* p) {
  const __m512i pairs = _mm512_loadu_si512(p);
  first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000)));
}
INLINE void store_bf16_pairs(uint16_t* p, F32 first, F32 second) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(round_bf16(first)), 16);
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_castps_si512(round_bf16(second))));
}
INLINE F32 lane_numbers() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
// 2^(byte - 127) of 16 scale bytes; byte 0 is the subnormal 2^-127
INLINE F32 load_scales(const uint8_t* p) {
  __m512i e = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)), 23);
  return _mm512_castsi512_ps(_mm512_max_epu32(e, _mm512_set1_epi32(0x00400000)));
}
// Words 0 and 1 of a lane are two rows of codes: word w's nibble j is the code of one input.
INLINE __m512i code_table() {  // the 16 codes in bfloat16, twice: vpermw looks at 5 bits, the fifth is the next code's
  const __m256i once =
      _mm256_setr_epi16(0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, (short)0x8000, (short)0xBF00,
                        (short)0xBF80, (short)0xBFC0, (short)0xC000, (short)0xC040, (short)0xC080, (short)0xC0C0);
  return _mm512_broadcast_i64x4(once);
}

constexpr int64_t kHalves = 2;
constexpr int64_t halves(int64_t) { return 2; }
#if defined(__AVX512BF16__)
constexpr int64_t kTile = 12;
using Packed = uint16_t;
using Weights = __m512i;
using Tokens = __m512i;
INLINE Weights load_weights(const uint16_t* p) { return _mm512_loadu_si512(p); }
INLINE Tokens load_tokens(const Packed* p) { return _mm512_set1_epi32(*(const int32_t*)p); }
INLINE F32 dot2(F32 acc, Weights w, Tokens t) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)t); }
INLINE Weights from_pairs(__m512i pairs) { return pairs; }
#else
constexpr int64_t kTile = 8;
using Packed = float;
struct Weights {
  F32 even, odd;
};
struct Tokens {
  F32 even, odd;
};
INLINE Weights from_pairs(__m512i pairs) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000)))};
}
INLINE Weights load_weights(const uint16_t* p) { return from_pairs(_mm512_loadu_si512(p)); }
INLINE Tokens load_tokens(const Packed* p) { return {set1(p[0]), set1(p[1])}; }
INLINE F32 dot2(F32 acc, Weights w, Tokens t) { return fma(w.odd, t.odd, fma(w.even, t.even, acc)); }
#endif

// Codes of 8 inputs of 16 rows (64 bytes) -> pair j holds inputs 2j and 2j + 1.
constexpr float kCodeUnit = 1;
struct Codes {
  __m512i words;
};
INLINE Codes load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
template <int j>
INLINE Weights code_pair(Codes codes) {
  return from_pairs(_mm512_permutexvar_epi16(j ? _mm512_srli_epi16(codes.words, 4 * j) : codes.words, code_table()));
}

#elif defined(__AVX2__)
// --------------------------------------------------------------------------------------------------------- AVX2
struct F32 {
  __m256 lo, hi;
};
using Mask = F32;

INLINE F32 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE F32 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, F32 x) { _mm256_storeu_ps(p, x.lo), _mm256_storeu_ps(p + 8, x.hi); }
#define BOTH(name, call) \
  INLINE F32 name(F32 a, F32 b) { return {call(a.lo, b.lo), call(a.hi, b.hi)}; }
BOTH(add, _mm256_add_ps)
BOTH(sub, _mm256_sub_ps)
BOTH(mul, _mm256_mul_ps)
BOTH(div, _mm256_div_ps)
BOTH(max, _mm256_max_ps)
BOTH(min, _mm256_min_ps)
#undef BOTH
INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
INLINE Mask less(F32 a, F32 b) { return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)}; }
INLINE F32 select(Mask m, F32 yes, F32 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
INLINE F32 round_nearest(F32 x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.lo, mode), _mm256_round_ps(x.hi, mode)};
}
INLINE __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE F32 scale_by_power(F32 x, F32 n) { return mul(x, {power_of_two(n.lo), power_of_two(n.hi)}); }
INLINE __m256 widen(__m128i bf16x8) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16x8), 16)); }
INLINE F32 load_bf16(const uint16_t* p) {
  return {widen(_mm_loadu_si128((const __m128i*)p)), widen(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
INLINE __m256 round_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256 quiet = _mm256_or_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x400000)));
  const __m256 value = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_and_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32((int)0xFFFF0000)));
}
INLINE F32 round_bf16(F32 x) { return {round_bf16(x.lo), round_bf16(x.hi)}; }
INLINE void store_bf16(uint16_t* p, F32 x) {
  const F32 r = round_bf16(x);
  const __m256i lo = _mm256_srli_epi32(_mm256_castps_si256(r.lo), 16), hi = _mm256_srli_epi32(_mm256_castps_si256(r.hi), 16);
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xD8));
}
INLINE __m256i high_halves(__m256 x) { return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32((int)0xFFFF0000)); }
INLINE void load_bf16_pairs(F32& first, F32& second, const uint16_t* p) {
  const __m256i lo = _mm256_loadu_si256((const __m256i*)p), hi = _mm256_loadu_si256((const __m256i*)(p + 16));
  first = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  second = {_mm256_castsi256_ps(high_halves(_mm256_castsi256_ps(lo))),
            _mm256_castsi256_ps(high_halves(_mm256_castsi256_ps(hi)))};
}
INLINE void store_bf16_pairs(uint16_t* p, F32 first, F32 second) {
  const F32 a = round_bf16(first), b = round_bf16(second);
  const __m256i lo = _mm256_srli_epi32(_mm256_castps_si256(a.lo), 16), hi = _mm256_srli_epi32(_mm256_castps_si256(a.hi), 16);
  _mm256_storeu_si256((__m256i*)p, _mm256_or_si256(lo, _mm256_castps_si256(b.lo)));
  _mm256_storeu_si256((__m256i*)(p + 16), _mm256_or_si256(hi, _mm256_castps_si256(b.hi)));
}
INLINE F32 lane_numbers() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15)}; }
INLINE __m256 scales8(__m128i bytes) {
  __m256i e = _mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23);
  return _mm256_castsi256_ps(_mm256_max_epu32(e, _mm256_set1_epi32(0x00400000)));
}
INLINE F32 load_scales(const uint8_t* p) {
  __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return {scales8(bytes), scales8(_mm_srli_si128(bytes, 8))};
}

constexpr int64_t kTile = 6, kHalves = 1;
// Sums of one token and 16 rows are too few chains: each addition would wait for the one before.
constexpr int64_t halves(int64_t tokens) { return tokens <= 2 ? 2 : 1; }
using Packed = float;
struct Weights {  // as they are in memory
  __m256i lo, hi;
};
struct Tokens {
  __m256 even, odd;
};
INLINE __m256 even_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
INLINE __m256 odd_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xFFFF0000))); }
INLINE F32 even_of(const Weights& w) { return {even_of(w.lo), even_of(w.hi)}; }
INLINE F32 odd_of(const Weights& w) { return {odd_of(w.lo), odd_of(w.hi)}; }
INLINE Weights load_weights(const uint16_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 16))};
}
INLINE Tokens load_tokens(const Packed* p) { return {_mm256_set1_ps(p[0]), _mm256_set1_ps(p[1])}; }
INLINE F32 dot1(F32 acc, F32 w, __m256 t) { return {_mm256_fmadd_ps(w.lo, t, acc.lo), _mm256_fmadd_ps(w.hi, t, acc.hi)}; }
// The same in a product's panels: loaded twice, for want of registers.
struct PanelWeights {
  const uint16_t* pairs;
};
INLINE PanelWeights panel_weights(const uint16_t* p) { return {p}; }
INLINE F32 even_of(PanelWeights w) { return even_of(load_weights(w.pairs)); }
INLINE F32 odd_of(PanelWeights w) {
  __asm__("" : "+r"(w.pairs));
  return odd_of(load_weights(w.pairs));
}
INLINE F32 dot2(F32 acc, const Weights& w, Tokens t) { return dot1(dot1(acc, even_of(w), t.even), odd_of(w), t.odd); }

// Codes of 8 inputs of 16 rows, as bytes of twice the value: those of the low nibbles, and of the high ones. A byte in the top
// of a lane is 2^25 times the value after one conversion; a block's sums are so much larger, and must stay below 2^128.
struct Codes {
  __m256i low_lo, low_hi, high_lo, high_hi;
};
constexpr float kCodeUnit = 0x1p-25f;  // what code_pair's 1 stands for
INLINE __m256i doubled_values(__m256i nibbles) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
  return _mm256_shuffle_epi8(table, _mm256_and_si256(nibbles, _mm256_set1_epi8(15)));
}
INLINE Codes load_codes(const uint8_t* p) {
  const __m256i a = _mm256_loadu_si256((const __m256i*)p), b = _mm256_loadu_si256((const __m256i*)(p + 32));
  Codes codes = {doubled_values(a), doubled_values(b), doubled_values(_mm256_srli_epi16(a, 4)),
                 doubled_values(_mm256_srli_epi16(b, 4))};
  __asm__("" : "+m"(codes));  // or they take registers, and sums are kept in memory
  return codes;
}
// Two inputs of 16 rows: bytes n and n + 2 of every four.
template <int n>
struct CodePair {
  __m256i lo, hi;
};
template <int n>
INLINE __m256 byte_of(__m256i v) {
  if constexpr (n == 0) return _mm256_cvtepi32_ps(_mm256_slli_epi32(v, 24));
  if constexpr (n == 3) return _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32((int)0xFF000000)));
  constexpr char z = (char)0x80;
  const __m256i to_top =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(z, z, z, n, z, z, z, n + 4, z, z, z, n + 8, z, z, z, n + 12));
  return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(v, to_top));
}
template <int n>
INLINE F32 even_of(CodePair<n> w) {
  return {byte_of<n>(w.lo), byte_of<n>(w.hi)};
}
template <int n>
INLINE F32 odd_of(CodePair<n> w) {
  return {byte_of<n + 2>(w.lo), byte_of<n + 2>(w.hi)};
}
template <int j>
INLINE CodePair<j / 2> code_pair(const Codes& c) {
  if constexpr (j % 2)
    return {c.high_lo, c.high_hi};
  else
    return {c.low_lo, c.low_hi};
}

// Adds one pair of inputs of 16 or 32 rows times T tokens: first the even input, then the odd one, or there were not registers
// enough for 12 sums.
template <int64_t H, int T, class W>
INLINE void add_pair(F32 (&sums)[H][T], const W (&w)[H], const Packed* x) {
  UNROLL for (int odd = 0; odd < 2; ++odd) {
    F32 inputs[H];
    UNROLL for (int h = 0; h < H; ++h) inputs[h] = odd ? odd_of(w[h]) : even_of(w[h]);
    UNROLL for (int t = 0; t < T; ++t) {
      const __m256 token = _mm256_broadcast_ss(x + 2 * t + odd);
      UNROLL for (int h = 0; h < H; ++h) sums[h][t] = dot1(sums[h][t], inputs[h], token);
    }
  }
}

#else
// ------------------------------------------------------------------------------------------------- any processor
struct F32 {
  float v[16];
};
struct Mask {
  bool v[16];
};
// clang-format off
#define LANES(T, expression)                                \
  {                                                         \
    T r;                                                    \
    for (int i = 0; i < 16; ++i) r.v[i] = (expression);     \
    return r;                                               \
  }
INLINE float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
INLINE uint32_t round_bits(uint32_t bits) {
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return (bits | 0x400000) & 0xFFFF0000;
  return (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
}
INLINE F32 zero() LANES(F32, 0.f)
INLINE F32 set1(float x) LANES(F32, x)
INLINE F32 load(const float* p) LANES(F32, p[i])
INLINE void store(float* p, const F32& x) {
  for (int i = 0; i < 16; ++i) p[i] = x.v[i];
}
INLINE F32 add(const F32& a, const F32& b) LANES(F32, a.v[i] + b.v[i])
INLINE F32 sub(const F32& a, const F32& b) LANES(F32, a.v[i] - b.v[i])
INLINE F32 mul(const F32& a, const F32& b) LANES(F32, a.v[i] * b.v[i])
INLINE F32 div(const F32& a, const F32& b) LANES(F32, a.v[i] / b.v[i])
INLINE F32 fma(const F32& a, const F32& b, const F32& c) LANES(F32, a.v[i] * b.v[i] + c.v[i])
INLINE F32 max(const F32& a, const F32& b) LANES(F32, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
INLINE F32 min(const F32& a, const F32& b) LANES(F32, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
INLINE Mask less(const F32& a, const F32& b) LANES(Mask, a.v[i] < b.v[i])
INLINE F32 select(const Mask& m, const F32& yes, const F32& no) LANES(F32, m.v[i] ? yes.v[i] : no.v[i])
INLINE F32 round_nearest(const F32& x) LANES(F32, (x.v[i] + 12582912.f) - 12582912.f)  // |x| < 2^22
INLINE F32 scale_by_power(const F32& x, const F32& n) LANES(F32, x.v[i] * bits_to_float((uint32_t)((int)n.v[i] + 127) << 23))
INLINE F32 load_bf16(const uint16_t* p) LANES(F32, bits_to_float((uint32_t)p[i] << 16))
INLINE F32 round_bf16(const F32& x) LANES(F32, bits_to_float(round_bits(float_to_bits(x.v[i]))))
INLINE void store_bf16(uint16_t* p, const F32& x) {
  for (int i = 0; i < 16; ++i) p[i] = (uint16_t)(round_bits(float_to_bits(x.v[i])) >> 16);
}
INLINE void load_bf16_pairs(F32& first, F32& second, const uint16_t* p) {
  for (int i = 0; i < 16; ++i) first.v[i] = bits_to_float((uint32_t)p[2 * i] << 16);
  for (int i = 0; i < 16; ++i) second.v[i] = bits_to_float((uint32_t)p[2 * i + 1] << 16);
}
INLINE void store_bf16_pairs(uint16_t* p, const F32& first, const F32& second) {
  for (int i = 0; i < 16; ++i) p[2 * i] = (uint16_t)(round_bits(float_to_bits(first.v[i])) >> 16);
  for (int i = 0; i < 16; ++i) p[2 * i + 1] = (uint16_t)(round_bits(float_to_bits(second.v[i])) >> 16);
}
INLINE F32 lane_numbers() LANES(F32, (float)i)
INLINE F32 load_scales(const uint8_t* p) LANES(F32, bits_to_float(p[i] ? (uint32_t)p[i] << 23 : 0x00400000u))

    // clang-format on

    constexpr int64_t kTile = 4;
constexpr int64_t kHalves = 1;
constexpr int64_t halves(int64_t) { return 1; }
using Packed = float;
struct Weights {
  F32 even, odd;
};
struct Tokens {
  float even, odd;
};
INLINE Weights load_weights(const uint16_t* p) {
  Weights w;
  for (int i = 0; i < 16; ++i) {
    w.even.v[i] = bits_to_float((uint32_t)p[2 * i] << 16);
    w.odd.v[i] = bits_to_float((uint32_t)p[2 * i + 1] << 16);
  }
  return w;
}
INLINE Tokens load_tokens(const Packed* p) { return {p[0], p[1]}; }
// clang-format off
INLINE F32 dot2(const F32& acc, const Weights& w, Tokens t) LANES(F32, (acc.v[i] + w.even.v[i] * t.even) + w.odd.v[i] * t.odd)
    // clang-format on

    struct Codes {
  const uint8_t* bytes;
};
INLINE Codes load_codes(const uint8_t* p) { return {p}; }
constexpr float kCodeUnit = 1;
template <int j>
INLINE Weights code_pair(Codes codes) {
  constexpr float values[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
  Weights w;
  for (int i = 0; i < 16; ++i) {
    const uint8_t* p = codes.bytes + 4 * i + j / 2;
    w.even.v[i] = values[(p[0] >> (4 * (j % 2))) & 15];
    w.odd.v[i] = values[(p[2] >> (4 * (j % 2))) & 15];
  }
  return w;
}
#undef LANES
#endif

// ------------------------------------------------------------------------------------------------ in these terms
constexpr int64_t kLanes = 16;

#if defined(__AVX512BW__) || !defined(__AVX2__)
INLINE Weights panel_weights(const uint16_t* p) { return load_weights(p); }
// Adds one pair of inputs of 16 or 32 rows times T tokens.
template <int64_t H, int T>
INLINE void add_pair(F32 (&sums)[H][T], const Weights (&w)[H], const Packed* x) {
  UNROLL for (int t = 0; t < T; ++t) {
    const Tokens token = load_tokens(x + 2 * t);
    UNROLL for (int h = 0; h < H; ++h) sums[h][t] = dot2(sums[h][t], w[h], token);
  }
}
#endif

#if defined(__AVX2__)
#if defined(__AVX512BW__)
INLINE __m256 low_half(F32 x) { return _mm512_castps512_ps256(x); }
INLINE __m256 high_half(F32 x) { return _mm512_extractf32x8_ps(x, 1); }
#else
INLINE __m256 low_half(F32 x) { return x.lo; }
INLINE __m256 high_half(F32 x) { return x.hi; }
#endif
// Lane i and lane i + 8, then i + 4, i + 2 and i + 1: a tree, the same in every set.
INLINE float sum_lanes(F32 x) {
  const __m256 eight = _mm256_add_ps(low_half(x), high_half(x));
  __m128 v = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}
INLINE float max_lanes(F32 x) {
  const __m256 eight = _mm256_max_ps(low_half(x), high_half(x));
  __m128 v = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  v = _mm_max_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}
#else
INLINE float sum_lanes(F32 x) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x.v[i] = x.v[i] + x.v[i + width];
  return x.v[0];
}
INLINE float max_lanes(const F32& x) {
  float m = x.v[0];
  for (int i = 1; i < 16; ++i) m = x.v[i] > m ? x.v[i] : m;
  return m;
}
#endif

// e^x to about one unit in the last place; 0 below the smallest normal number, large and finite above the largest.
// Cody-Waite reduction by ln 2 in two parts and the Taylor polynomial of degree 7 on [-ln2/2, ln2/2]; NaN stays NaN.
INLINE F32 exp(F32 x) {
  const F32 lowest = set1(-87.33654f);
  F32 y = max(lowest, min(set1(88.37f), x));
  F32 n = round_nearest(mul(y, set1(1.44269504f)));
  F32 r = fma(n, set1(-0.693359375f), y);
  r = fma(n, set1(2.12194440e-4f), r);
  F32 p = set1(1.f / 5040);
  p = fma(p, r, set1(1.f / 720));
  p = fma(p, r, set1(1.f / 120));
  p = fma(p, r, set1(1.f / 24));
  p = fma(p, r, set1(1.f / 6));
  p = fma(p, r, set1(.5f));
  p = fma(p, r, set1(1.f));
  p = fma(p, r, set1(1.f));
  return select(less(x, lowest), zero(), scale_by_power(p, n));
}

// 16 elements of a packed tile.
INLINE void store_packed(uint16_t* p, F32 x) { store_bf16(p, x); }
INLINE void store_packed(float* p, F32 x) { store(p, round_bf16(x)); }

}  // namespace
