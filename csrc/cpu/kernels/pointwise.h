// One row or one head at a time: embedding, RMSNorm, router logits, RoPE and the write into the cache.
#pragma once
#include "simd.h"

namespace {

static void embed(float* out, const uint16_t* row, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, load_bf16(row + i));
}

static void rmsnorm(float* out, const float* x, const float* weight, float eps, int64_t n) {
  F32 squares = zero();
  for (int64_t i = 0; i < n; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  const F32 scale = set1(1.f / __builtin_sqrtf(sum_lanes(squares) / (float)n + eps));
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
}

static void router(float* out, const float* t, const uint16_t* weight, const float* bias, int64_t n_experts, int64_t n) {
  for (int64_t e = 0; e < n_experts; ++e) {
    const uint16_t* row = weight + e * n;
    F32 even = zero(), odd = zero();  // two chains of sums; n is a multiple of 32
    for (int64_t i = 0; i < n; i += 2 * kLanes) {
      even = fma(load(t + i), load_bf16(row + i), even);
      odd = fma(load(t + i + kLanes), load_bf16(row + i + kLanes), odd);
    }
    out[e] = sum_lanes(add(even, odd)) + bias[e];
  }
}

static void rope(float* out, const float* x, const float* cos, const float* sin) {
  for (int64_t i = 0; i < 32; i += kLanes) {
    F32 c = load(cos + i), s = load(sin + i), first = load(x + i), second = load(x + i + 32);
    store(out + i, sub(mul(first, c), mul(second, s)));
    store(out + i + 32, add(mul(second, c), mul(first, s)));
  }
}

static void append(uint16_t* key_page, uint16_t* value_page, int64_t slot, const float* key, const float* value) {
  uint16_t rounded[64], *keys = key_page + slot / 16 * (16 * 64) + slot % 16 * 2;
  for (int64_t d = 0; d < 64; d += kLanes) store_bf16(rounded + d, load(key + d));
  for (int64_t d = 0; d < 64; d += 2 * kLanes)
    store_bf16_pairs(value_page + slot * 64 + d, load(value + d), load(value + d + kLanes));
  for (int64_t pair = 0; pair < 32; ++pair) __builtin_memcpy(keys + pair * 32, rounded + 2 * pair, 4);
}

}  // namespace
