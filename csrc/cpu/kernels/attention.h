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
constexpr int64_t kKeysAhead = 32;  // that are fetched

// Where the keys of the 16 positions from `key` lie (2 KiB), or, of any position on, the values.
INLINE const uint16_t* group_of(const uint8_t* pool, const AttentionArgs& a, int64_t key) {
  return (const uint16_t*)(pool + a.pages[key / kPage - a.first_page] * a.page_bytes) + key % kPage * kDim;
}

template <int T>
INLINE void round_queries(Packed* q, const AttentionArgs& a) {
  for (int64_t t = 0; t < T; ++t)
    for (int64_t d = 0; d < kDim; d += kLanes) store_packed(q + t * kDim + d, load(a.q + t * kDim + d));
}

// scores: [group][256] of the chunk at `chunk`, of the 16 Groups keys from `key` on; q: [T][64]
// A page is too short a stream for the processor to see it coming. So the values of these keys, wanted next, are fetched by
// hand, and keys with the values of the keys 256 before them; the first keys, which have none, a few keys ahead.
template <int T, int Groups>
INLINE void group_scores(float* scores, const AttentionArgs& a, const Packed* q, int64_t key, int64_t begin, int64_t end) {
  const uint16_t *k[Groups], *v[Groups], *later[Groups];
  F32 sums[Groups][T];
  UNROLL for (int g = 0; g < Groups; ++g) {
    const int64_t ahead = key + 16 * g + kKeysAhead;
    k[g] = group_of(a.keys, a, key + 16 * g);
    v[g] = group_of(a.values, a, key + 16 * g);
    later[g] = ahead < a.end_key && ahead < a.first_key + kChunkKeys ? group_of(a.keys, a, ahead) : k[g];
    UNROLL for (int t = 0; t < T; ++t) sums[g][t] = zero();
  }
  for (int64_t pair = 0; pair < kDim / 2; ++pair) {
    Weights keys[Groups];
    UNROLL for (int g = 0; g < Groups; ++g) {
      __builtin_prefetch(later[g] + pair * 32);
      __builtin_prefetch(v[g] + pair * 32);
      keys[g] = load_weights(k[g] + pair * 32);
    }
    UNROLL for (int t = 0; t < T; ++t) {
      const Tokens token = load_tokens(q + t * kDim + 2 * pair);
      UNROLL for (int g = 0; g < Groups; ++g) sums[g][t] = dot2(sums[g][t], keys[g], token);
    }
  }
  UNROLL for (int g = 0; g < Groups; ++g, key += 16, scores += 16) {
    const Mask before = less(lane_numbers(), set1((float)(begin - key))),
               inside = less(lane_numbers(), set1((float)(end - key)));
    UNROLL for (int t = 0; t < T; ++t) {
      F32 s = mul(sums[g][t], set1(kScoreScale));
      if (key < begin) s = select(before, set1(kMinusInfinity), s);
      if (key + 16 > end) s = select(inside, s, set1(kMinusInfinity));
      store(scores + t * kChunkKeys, s);
    }
  }
}

template <int T>
static void chunk_scores(float* scores, const AttentionArgs& a, const Packed* q, int64_t chunk, int64_t begin, int64_t end) {
  constexpr int kGroups = kHalves;  // as many sums as in a product
  int64_t key = begin & ~15;
  for (; key + 16 * (kGroups - 1) < end; key += 16 * kGroups)
    group_scores<T, kGroups>(scores + key - chunk, a, q, key, begin, end);
  if (key < end) group_scores<T, 1>(scores + key - chunk, a, q, key, begin, end);
}

// values: [group][64] = sum over keys of probability * value; it fetches the keys 256 on
template <int Heads>
static void weigh_values(float* values, const AttentionArgs& a, const float* p, int64_t chunk, int64_t begin, int64_t end,
                         bool fetches) {
  F32 sums[Heads][kDimVectors];
  UNROLL for (int h = 0; h < Heads; ++h) { UNROLL for (int d = 0; d < kDimVectors; ++d) sums[h][d] = zero(); }
  for (int64_t key = begin; key < end;) {
    const int64_t page_end = (key / kPage + 1) * kPage < end ? (key / kPage + 1) * kPage : end;
    const uint16_t* v = group_of(a.values, a, key);
    const uint16_t* later = key + kChunkKeys < a.end_key ? group_of(a.keys, a, key + kChunkKeys) + (fetches ? 0 : 32) : v;
    for (; key < page_end; ++key, v += kDim, later += kDim) {
      __builtin_prefetch(later, 0, 2);
      F32 row[kDimVectors];
      UNROLL for (int d = 0; d < kDimVectors; d += 2) load_bf16_pairs(row[d], row[d + 1], v + d * kLanes);
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
    weigh_values<kAtOnce>(state.values + t * kDim, a, scores + t * kChunkKeys, chunk, begin, end, t == 0);
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
  for (int64_t t = 0; t < T; ++t) {
    const F32 share = set1(1.f / running.sum[t]);
    for (int64_t d = t * kDim; d < (t + 1) * kDim; d += kLanes) store(a.out + d, mul(load(a.out + d), share));
  }
}

INLINE int64_t first_chunk(const AttentionArgs& a) { return a.first_key / kChunkKeys * kChunkKeys; }

struct WholeRow {
  template <int T>
  static void run(const AttentionArgs& a) {
    alignas(64) float scores[T * kChunkKeys];
    Packed q[T * kDim];
    alignas(64) ChunkState<T> state;
    Running<T> running;
    round_queries<T>(q, a);
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
    Packed q[T * kDim];
    ChunkState<T>* state = (ChunkState<T>*)a.states;
    round_queries<T>(q, a);
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
