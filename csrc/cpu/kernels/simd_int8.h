// Products of bytes in the terms of one instruction set: the precision "fast" (the layouts are in kernel_table.h).
//
//   I32          16 int32
//   Quad         four signed inputs of one token, in every lane
//   CodeWeights  four FP4 weights of each of 16 output rows, unsigned: twice the value, plus 12 (0 .. 24)
//   Int8Weights  four int8 weights of each of 16 output rows, as kInt8Offset has it: plus 128 (1 .. 255), or signed
//   start<W>     what a block's sums start from: the offset's part of them taken away beforehand
//   add_bits     adds to the bits of a float32: a whole number << 23 multiplies by a power of two
//   dot4         acc + the four products, lane by lane; integers, so exact in every set
//   kInt8Tiles   tokens whose sums fit in registers; int8_halves(tokens): times 16 rows, or 32
#pragma once
#include "cpu/kernel_table.h"
#include "simd.h"

namespace {

// Twice each E2M1 value, plus 12.
#define GPTOSS_OFFSET_CODES 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0
// Inputs of a group of 8 in the order that MXFP4 panels have them: the low nibbles of 4 bytes, then the high ones.
#define GPTOSS_QUAD_ORDER 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15

#if defined(__AVX512BW__)
// ------------------------------------------------------------------------------------------------------ AVX-512
constexpr gptoss::cpu::TileSizes kInt8Tiles = {6, 8};
constexpr int64_t int8_halves(int64_t) { return 2; }
constexpr int kInt8Offset = 128;
using I32 = __m512i;
using Quad = __m512i;
struct CodeWeights {
  __m512i bytes;
};
struct Int8Weights {
  __m512i bytes;
};
template <class W>
INLINE F32 to_float(I32 x) {
  return _mm512_cvtepi32_ps(x);
}
INLINE F32 load_exponents(const uint8_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)), 23));
}
INLINE F32 add_bits(F32 x, int32_t n) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(n)));
}
INLINE Quad load_quad(const int8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
template <class W>
INLINE I32 start(int32_t correction) {
  return _mm512_set1_epi32(correction);
}
template <class W>
INLINE I32 dot4(I32 acc, W w, Quad t) {
  return _mm512_dpbusd_epi32(acc, w.bytes, t);
}
INLINE Int8Weights load_int8(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
// 64 bytes of nibbles: 16 rows, 8 inputs -> both quads
INLINE void decode_codes(CodeWeights& low, CodeWeights& high, const uint8_t* p) {
  const __m512i v = _mm512_loadu_si512(p), shifted = _mm512_srli_epi16(v, 4);
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(GPTOSS_OFFSET_CODES));
#if defined(__AVX512VBMI__)  // vpermb looks at 6 bits: the table is there four times, whatever the upper two are
  low = {_mm512_permutexvar_epi8(v, table)};
  high = {_mm512_permutexvar_epi8(shifted, table)};
#else
  const __m512i nibble = _mm512_set1_epi8(15);
  low = {_mm512_shuffle_epi8(table, _mm512_and_si512(v, nibble))};
  high = {_mm512_shuffle_epi8(table, _mm512_and_si512(shifted, nibble))};
#endif
}
// The largest of |a| and |b| as bits, which order as integers; not a number is larger than all.
INLINE uint32_t largest_bits(F32 a, F32 b) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  return _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(a), magnitude),
                                                  _mm512_and_si512(_mm512_castps_si512(b), magnitude)));
}
// What a token's sums of a block start from; codes: the block's, sum: of all of them.
INLINE int32_t correction_of(const int8_t*, int32_t sum, int32_t offset) { return -offset * sum; }
// 32 numbers, |x| <= 127.5, to the nearest int8 in quad order; returns their sum.
INLINE int32_t to_int8(int8_t* out, F32 a, F32 b) {
  const __m512i m = _mm512_cvtps_epi32(a), n = _mm512_cvtps_epi32(b);
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(GPTOSS_QUAD_ORDER));
  const __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_cvtepi32_epi8(m)), _mm512_cvtepi32_epi8(n), 1);
  _mm256_storeu_si256((__m256i*)out, _mm256_shuffle_epi8(bytes, order));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(m, n));
}

#elif defined(__AVX2__)
// --------------------------------------------------------------------------------------------------------- AVX2
struct I32 {
  __m256i lo, hi;
};
using Quad = __m256i;
INLINE __m256 exponents8(__m128i bytes) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23)); }
INLINE F32 load_exponents(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return {exponents8(bytes), exponents8(_mm_srli_si128(bytes, 8))};
}
INLINE __m256 add_bits(__m256 x, __m256i n) { return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), n)); }
INLINE F32 add_bits(F32 x, int32_t n) { return {add_bits(x.lo, _mm256_set1_epi32(n)), add_bits(x.hi, _mm256_set1_epi32(n))}; }
INLINE Quad load_quad(const int8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

constexpr gptoss::cpu::TileSizes kInt8Tiles = {6, 6};
constexpr int64_t int8_halves(int64_t tokens) { return tokens <= 2 ? 2 : 1; }
#if defined(__AVXVNNI__)
constexpr int kInt8Offset = 128;
struct CodeWeights {
  __m256i lo, hi;
};
struct Int8Weights {
  __m256i lo, hi;
};
template <class W>
INLINE F32 to_float(I32 x) {
  return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)};
}
template <class W>
INLINE I32 start(int32_t correction) {
  const __m256i both = _mm256_set1_epi32(correction);
  return {both, both};
}
template <class W>
INLINE I32 dot4(I32 acc, const W& w, Quad t) {
  return {_mm256_dpbusd_avx_epi32(acc.lo, w.lo, t), _mm256_dpbusd_avx_epi32(acc.hi, w.hi, t)};
}
INLINE Int8Weights load_int8(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
INLINE int32_t correction_of(const int8_t*, int32_t sum, int32_t offset) { return -offset * sum; }
#else
// vpmaddubsw multiplies and adds two products in 16 bits, with saturation: enough for two of codes (24 x 127 x 2).
// Codes: 16 bits even hold what 16 inputs come to without the offset (12 x 127 x 16). So sums stay int16 for a block, start
// from the offset's part taken away, and may wrap on the way: two instructions for four inputs (vpaddw), and vpmaddwd once a
// block. int8: weights' signs move over to the tokens (127 x 127 x 2, and no offset): vpsignb, vpmaddubsw, vpmaddwd and vpaddd.
constexpr int kInt8Offset = 0;
struct CodeWeights {
  static constexpr bool kOffset = true;
  __m256i lo, hi;
};
struct Int8Weights {
  static constexpr bool kOffset = false;
  __m256i lo, hi;            // signed
  __m256i size_lo, size_hi;  // their magnitudes
};
INLINE __m256i add_lanes(__m256i x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }
template <class W>
INLINE F32 to_float(I32 x) {
  if constexpr (W::kOffset) x = {add_lanes(x.lo), add_lanes(x.hi)};  // pairs of int16
  return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)};
}
template <class W>
INLINE I32 start(int32_t correction) {
  const __m256i both = _mm256_set1_epi32(W::kOffset ? correction : 0);
  return {both, both};
}
// Or GCC adds up all products of a block as a tree, and keeps them in memory until then.
INLINE __m256i in_order(__m256i sum) {
  __asm__("" : "+x"(sum));
  return sum;
}
INLINE __m256i add_products(__m256i acc, __m256i w, __m256i t) {
  return in_order(_mm256_add_epi32(acc, add_lanes(_mm256_maddubs_epi16(w, t))));
}
INLINE I32 dot4(I32 acc, const CodeWeights& w, Quad t) {
  return {in_order(_mm256_add_epi16(acc.lo, _mm256_maddubs_epi16(w.lo, t))),
          in_order(_mm256_add_epi16(acc.hi, _mm256_maddubs_epi16(w.hi, t)))};
}
INLINE I32 dot4(I32 acc, const Int8Weights& w, Quad t) {
  return {add_products(acc.lo, w.size_lo, _mm256_sign_epi8(t, w.lo)),
          add_products(acc.hi, w.size_hi, _mm256_sign_epi8(t, w.hi))};
}
INLINE Int8Weights load_int8(const uint8_t* p) {
  const __m256i lo = _mm256_loadu_si256((const __m256i*)p), hi = _mm256_loadu_si256((const __m256i*)(p + 32));
  return {lo, hi, _mm256_abs_epi8(lo), _mm256_abs_epi8(hi)};
}
INLINE int32_t correction_of(const int8_t* codes, int32_t, int32_t offset) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8((char)offset), _mm256_loadu_si256((const __m256i*)codes));
  __m128i n = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  n = _mm_add_epi16(n, _mm_shuffle_epi32(n, 0x4E));
  n = _mm_add_epi16(n, _mm_shuffle_epi32(n, 0xB1));
  return _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), n));
}
#endif

INLINE __m256i offset_codes(__m256i nibbles) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(GPTOSS_OFFSET_CODES));
  return _mm256_shuffle_epi8(table, _mm256_and_si256(nibbles, _mm256_set1_epi8(15)));
}
INLINE void decode_codes(CodeWeights& low, CodeWeights& high, const uint8_t* p) {
  const __m256i a = _mm256_loadu_si256((const __m256i*)p), b = _mm256_loadu_si256((const __m256i*)(p + 32));
  low = {offset_codes(a), offset_codes(b)};
  high = {offset_codes(_mm256_srli_epi16(a, 4)), offset_codes(_mm256_srli_epi16(b, 4))};
}
INLINE __m256i magnitude_bits(__m256 x) { return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFFFF)); }
INLINE uint32_t largest_bits(F32 a, F32 b) {
  const __m256i m = _mm256_max_epu32(_mm256_max_epu32(magnitude_bits(a.lo), magnitude_bits(a.hi)),
                                     _mm256_max_epu32(magnitude_bits(b.lo), magnitude_bits(b.hi)));
  __m128i n = _mm_max_epu32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  n = _mm_max_epu32(n, _mm_shuffle_epi32(n, 0x4E));
  n = _mm_max_epu32(n, _mm_shuffle_epi32(n, 0xB1));
  return (uint32_t)_mm_cvtsi128_si32(n);
}
INLINE int32_t to_int8(int8_t* out, F32 a, F32 b) {
  const __m256i a_lo = _mm256_cvtps_epi32(a.lo), a_hi = _mm256_cvtps_epi32(a.hi), b_lo = _mm256_cvtps_epi32(b.lo),
                b_hi = _mm256_cvtps_epi32(b.hi);
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(a_lo, a_hi), _mm256_add_epi32(b_lo, b_hi));
  // Packed lane by lane: 4 bytes of each of a_lo, a_hi, b_lo, b_hi, twice.
  const __m256i mixed = _mm256_packs_epi16(_mm256_packs_epi32(a_lo, a_hi), _mm256_packs_epi32(b_lo, b_hi));
  const __m256i bytes = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(GPTOSS_QUAD_ORDER));
  _mm256_storeu_si256((__m256i*)out, _mm256_shuffle_epi8(bytes, order));
  __m128i n = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  n = _mm_add_epi32(n, _mm_shuffle_epi32(n, 0x4E));
  n = _mm_add_epi32(n, _mm_shuffle_epi32(n, 0xB1));
  return _mm_cvtsi128_si32(n);
}

#else
// ------------------------------------------------------------------------------------------------- any processor
constexpr gptoss::cpu::TileSizes kInt8Tiles = {4, 4};
constexpr int64_t int8_halves(int64_t) { return 1; }
constexpr int kInt8Offset = 128;
struct I32 {
  int32_t v[16];
};
struct Quad {
  int8_t v[4];
};
struct CodeWeights {
  uint8_t v[64];
};
struct Int8Weights {
  uint8_t v[64];
};
template <class W>
INLINE F32 to_float(const I32& x) {
  F32 r;
  for (int i = 0; i < 16; ++i) r.v[i] = (float)x.v[i];
  return r;
}
INLINE F32 load_exponents(const uint8_t* p) {
  F32 r;
  for (int i = 0; i < 16; ++i) r.v[i] = bits_to_float((uint32_t)p[i] << 23);
  return r;
}
INLINE F32 add_bits(const F32& x, int32_t n) {
  F32 r;
  for (int i = 0; i < 16; ++i) r.v[i] = bits_to_float(float_to_bits(x.v[i]) + (uint32_t)n);
  return r;
}
INLINE Quad load_quad(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
template <class W>
INLINE I32 start(int32_t correction) {
  I32 r;
  for (int i = 0; i < 16; ++i) r.v[i] = correction;
  return r;
}
template <class W>
INLINE I32 dot4(const I32& acc, const W& w, Quad t) {
  I32 r;
  for (int i = 0; i < 16; ++i) {
    r.v[i] = acc.v[i];
    for (int j = 0; j < 4; ++j) r.v[i] += w.v[4 * i + j] * t.v[j];
  }
  return r;
}
INLINE Int8Weights load_int8(const uint8_t* p) {
  Int8Weights w;
  __builtin_memcpy(w.v, p, 64);
  return w;
}
INLINE void decode_codes(CodeWeights& low, CodeWeights& high, const uint8_t* p) {
  constexpr uint8_t table[16] = {GPTOSS_OFFSET_CODES};
  for (int i = 0; i < 64; ++i) {
    low.v[i] = table[p[i] & 15];
    high.v[i] = table[p[i] >> 4];
  }
}
INLINE uint32_t largest_bits(const F32& a, const F32& b) {
  uint32_t most = 0;
  for (int i = 0; i < 16; ++i) {
    const uint32_t x = float_to_bits(a.v[i]) & 0x7FFFFFFF, y = float_to_bits(b.v[i]) & 0x7FFFFFFF;
    most = x > most ? x : most;
    most = y > most ? y : most;
  }
  return most;
}
INLINE int32_t correction_of(const int8_t*, int32_t sum, int32_t offset) { return -offset * sum; }
INLINE int32_t to_int8(int8_t* out, const F32& a, const F32& b) {
  constexpr int order[16] = {GPTOSS_QUAD_ORDER};
  const F32 m = round_nearest(a), n = round_nearest(b);
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) {
    out[i] = (int8_t)m.v[order[i]];
    out[16 + i] = (int8_t)n.v[order[i]];
    sum += out[i] + out[16 + i];
  }
  return sum;
}
#endif

}  // namespace
