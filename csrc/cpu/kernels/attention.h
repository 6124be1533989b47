// Attention of one token: the query heads of one key/value head over that head's keys, with a sink.
//
// The sink (one logit a head) takes part in the softmax but has no value: the running state starts at maximum = sink, sum = 1,
// output 0. Keys are taken in chunks of 256 aligned to absolute positions: a chunk's scores (lanes are keys, the product is the
// one of matmul.h with 16 keys as rows), its maximum, its exponentials, its weighted values; then it joins the running state.
// Keys outside [first_key, end_key) are masked and their values never touched, so whatever lies there cannot leak.
//
// Either one call does all that, or several leave the states of some chunks each, and one joins them: the same functions on the
// same chunks in the same order, so the same bits.
#pragma once
#include "cpu/kernel_table.h"
#include "simd.h"

namespace {

using gptoss::cpu::AttentionArgs;
using gptoss::cpu::kChunkKeys;
using gptoss::cpu::kMaxGroup;
using gptoss::cpu::kStateFloats;

constexpr int64_t kPage = 128, kDim = 64, kDimVectors = kDim / kLanes;
constexpr float kScoreScale = 0.125f;  // 1 / sqrt(64)
constexpr float kMinusInfinity = -__builtin_inff();

// Where the keys of the 16 positions from `key` lie (2 KiB), or, of any position on, the values.
INLINE const uint16_t* group_of(const uint8_t* pool, const AttentionArgs& a, int64_t key) {
  return (const uint16_t*)(pool + a.pages[key / kPage - a.first_page] * a.page_bytes) + key % kPage * kDim;
}

// scores: [group][256] of the chunk at `chunk`; q: packed [32 pairs][T][2]
// A page is too short a stream for the processor to see it coming: the keys two groups on and the values of this group, wanted
// next, are fetched by hand.
template <int T>
static void chunk_scores(float* scores, const AttentionArgs& a, const Packed* q, int64_t chunk, int64_t begin, int64_t end) {
  float lane[16];
  for (int64_t i = 0; i < 16; ++i) lane[i] = (float)i;
  for (int64_t key = begin & ~15; key < end; key += 16) {
    const uint16_t* k = group_of(a.keys, a, key);
    const uint16_t* v = group_of(a.values, a, key);
    const uint16_t* later = key + 32 < a.end_key ? group_of(a.keys, a, key + 32) : k;
    F32 sums[T];
    UNROLL for (int t = 0; t < T; ++t) sums[t] = zero();
    for (int64_t pair = 0; pair < kDim / 2; ++pair) {
      __builtin_prefetch(later + pair * 32);
      __builtin_prefetch(v + pair * 32);
      Weights keys = load_weights(k + pair * 32);
      UNROLL for (int t = 0; t < T; ++t) sums[t] = dot2(sums[t], keys, load_tokens(q + (pair * T + t) * 2));
    }
    const F32 before = set1((float)(begin - key)), after = set1((float)(end - key));
    UNROLL for (int t = 0; t < T; ++t) {
      F32 s = mul(sums[t], set1(kScoreScale));
      s = select(less(load(lane), before), set1(kMinusInfinity), s);
      s = select(less(load(lane), after), s, set1(kMinusInfinity));
      store(scores + t * kChunkKeys + (key - chunk), s);
    }
  }
}

// values: [group][64] = sum over keys of probability * value
template <int Heads>
static void weigh_values(float* values, const AttentionArgs& a, const float* p, int64_t chunk, int64_t begin, int64_t end) {
  F32 sums[Heads][kDimVectors];
  UNROLL for (int h = 0; h < Heads; ++h) { UNROLL for (int d = 0; d < kDimVectors; ++d) sums[h][d] = zero(); }
  for (int64_t key = begin; key < end;) {
    const int64_t page_end = (key / kPage + 1) * kPage < end ? (key / kPage + 1) * kPage : end;
    const uint16_t* v = group_of(a.values, a, key);
    for (; key < page_end; ++key, v += kDim) {
      F32 row[kDimVectors];
      UNROLL for (int d = 0; d < kDimVectors; ++d) row[d] = load_bf16(v + d * kLanes);
      UNROLL for (int h = 0; h < Heads; ++h) {
        const F32 weight = set1(p[h * kChunkKeys + (key - chunk)]);
        UNROLL for (int d = 0; d < kDimVectors; ++d) sums[h][d] = fma(weight, row[d], sums[h][d]);
      }
    }
  }
  UNROLL for (int h = 0; h < Heads; ++h) {
    UNROLL for (int d = 0; d < kDimVectors; ++d) store(values + h * kDim + d * kLanes, sums[h][d]);
  }
}

// scores -> exp(scores - maximum), their maximum and sum
INLINE void chunk_softmax(float* scores, float* maximum, float* sum, int64_t first, int64_t n) {
  F32 m = set1(kMinusInfinity);
  for (int64_t i = first; i < n; i += kLanes) m = max(m, load(scores + i));
  *maximum = max_lanes(m);
  F32 total = zero();
  for (int64_t i = first; i < n; i += kLanes) {
    F32 p = exp(sub(load(scores + i), set1(*maximum)));
    store(scores + i, p);
    total = add(total, p);
  }
  *sum = sum_lanes(total);
}

// What the softmax over one chunk comes to.
template <int T>
struct ChunkState {
  float values[T * kDim];  // [group][64] sum over keys of exp(score - maximum) * value
  float maximum[T];
  float sum[T];  // of exp(score - maximum)
};

// Of the chunk at `chunk`.    scores: [group][256], work space
template <int T>
INLINE void make_state(ChunkState<T>& state, float* scores, const AttentionArgs& a, const Packed* q, int64_t chunk) {
  const int64_t begin = chunk > a.first_key ? chunk : a.first_key;
  const int64_t end = chunk + kChunkKeys < a.end_key ? chunk + kChunkKeys : a.end_key;
  chunk_scores<T>(scores, a, q, chunk, begin, end);
  for (int64_t t = 0; t < T; ++t)
    chunk_softmax(scores + t * kChunkKeys, state.maximum + t, state.sum + t, (begin & ~15) - chunk, end - chunk);
  constexpr int kAtOnce = kHalves == 2 && T % 4 == 0 ? 4 : 1;  // heads whose sums fit in registers
  for (int64_t t = 0; t < T; t += kAtOnce)
    weigh_values<kAtOnce>(state.values + t * kDim, a, scores + t * kChunkKeys, chunk, begin, end);
}

// The softmax over the sink and all chunks so far; the sum of values is a.out.
template <int T>
struct Running {
  float maximum[T];
  float sum[T];
};

template <int T>
INLINE void start(Running<T>& running, const AttentionArgs& a) {
  for (int64_t t = 0; t < T; ++t) {
    running.maximum[t] = a.sinks[t];
    running.sum[t] = 1.f;
    for (int64_t d = 0; d < kDim; ++d) a.out[t * kDim + d] = 0.f;
  }
}

template <int T>
INLINE void join(Running<T>& running, const AttentionArgs& a, const ChunkState<T>& state) {
  static_assert(2 * T <= kLanes);
  float factors[kLanes] = {};  // of the running state, then of the chunk
  for (int64_t t = 0; t < T; ++t) {
    const float top = state.maximum[t] > running.maximum[t] ? state.maximum[t] : running.maximum[t];
    factors[t] = running.maximum[t] - top;
    factors[T + t] = state.maximum[t] - top;
    running.maximum[t] = top;
  }
  store(factors, exp(load(factors)));
  for (int64_t t = 0; t < T; ++t) {
    const float keep = factors[t], add = factors[T + t];
    for (int64_t d = t * kDim; d < (t + 1) * kDim; d += kLanes)
      store(a.out + d, fma(set1(add), load(state.values + d), mul(set1(keep), load(a.out + d))));
    running.sum[t] = running.sum[t] * keep + state.sum[t] * add;
  }
}

template <int T>
INLINE void finish(const Running<T>& running, const AttentionArgs& a) {
  for (int64_t t = 0; t < T; ++t)
    for (int64_t d = t * kDim; d < (t + 1) * kDim; d += kLanes) store(a.out + d, div(load(a.out + d), set1(running.sum[t])));
}

INLINE int64_t first_chunk(const AttentionArgs& a) { return a.first_key / kChunkKeys * kChunkKeys; }

struct WholeRow {
  template <int T>
  static void run(const AttentionArgs& a) {
    alignas(64) float scores[T * kChunkKeys];
    alignas(64) Packed q[T * kDim];
    alignas(64) ChunkState<T> state;
    Running<T> running;
    pack_tokens(q, a.q, kDim, nullptr, T, kDim);
    start(running, a);
    for (int64_t chunk = first_chunk(a); chunk < a.end_key; chunk += kChunkKeys) {
      make_state(state, scores, a, q, chunk);
      join(running, a, state);
    }
    finish(running, a);
  }
};

struct MakeStates {
  template <int T>
  static void run(const AttentionArgs& a) {
    static_assert(sizeof(ChunkState<T>) == T * kStateFloats * sizeof(float));
    alignas(64) float scores[T * kChunkKeys];
    alignas(64) Packed q[T * kDim];
    ChunkState<T>* state = (ChunkState<T>*)a.states;
    pack_tokens(q, a.q, kDim, nullptr, T, kDim);
    for (int64_t chunk = first_chunk(a); chunk < a.end_key; chunk += kChunkKeys) make_state(*state++, scores, a, q, chunk);
  }
};

struct JoinStates {
  template <int T>
  static void run(const AttentionArgs& a) {
    const ChunkState<T>* state = (const ChunkState<T>*)a.states;
    Running<T> running;
    start(running, a);
    for (int64_t chunk = first_chunk(a); chunk < a.end_key; chunk += kChunkKeys) join(running, a, *state++);
    finish(running, a);
  }
};

template <class Work, int T = kMaxGroup>
static void for_group(const AttentionArgs& a) {
  if constexpr (T > 0) {
    if (a.group == T) return Work::template run<T>(a);
    for_group<Work, T - 1>(a);
  }
}

static void attention(const AttentionArgs& a) { for_group<WholeRow>(a); }
static void attention_states(const AttentionArgs& a) { for_group<MakeStates>(a); }
static void attention_join(const AttentionArgs& a) { for_group<JoinStates>(a); }

}  // namespace
