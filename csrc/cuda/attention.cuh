// What attention's kernels are made of (attention.cu alone includes this): which keys a row sees, pages in shared memory, and
// the arithmetic of a warp. Everything that decides a row's bits is here, and both kernels use it.
#pragma once
#include "cuda/kernels.h"

namespace gptoss::cuda {
namespace {

constexpr int kPage = 128, kHalf = 64, kDim = 64, kHeads = 8;  // keys, keys, dimensions, query heads
constexpr int kPageTiles = kPage / 16, kHalfTiles = kHalf / 16, kDimTiles = kDim / 16, kSteps = kDim / 16;
constexpr int kPageBytes = kPage * kDim * 2;  // of keys, or of values
constexpr int kMaxSpans = 32;
constexpr float kLog2e = 1.44269502f, kLog2eRest = 1.92596303e-8f;  // their sum is 1 / ln 2
constexpr float kScale = 0.125f * kLog2e;                           // c

// ------------------------------------------------------------------------------------------------- which keys, which heads

// What a row sees, a function of its position alone.
struct Sight {
  int first_key, end_key;
  int first_page, n_pages, span;  // pages a span
  __device__ int spans() const { return span == 1 ? n_pages : (n_pages + span - 1) / span; }
};

__device__ __forceinline__ Sight sight_of(int end_key, int window) {
  Sight s;
  s.end_key = end_key;
  s.first_key = window && end_key > window ? end_key - window : 0;
  s.first_page = s.first_key / kPage;
  s.n_pages = (end_key - 1) / kPage - s.first_page + 1;
  s.span = (s.n_pages + kMaxSpans - 1) / kMaxSpans;
  return s;
}

// Of the row's sequence, by absolute page number.
__device__ __forceinline__ const int32_t* page_numbers(const AttentionArgs& a, int row) {
  return a.batch.pages + (a.window ? a.batch.window_base : a.batch.full_base)[a.batch.sequence_of[row]];
}

// A key/value head and up to 8 of its query heads. There are `passes` such units a key/value head.
struct Heads {
  int kv_head, first, n;
};

__device__ __forceinline__ Heads find_heads(int unit, int group, int passes) {
  const int kv_head = passes == 1 ? unit : unit / passes, skipped = (unit - kv_head * passes) * kHeads;
  return {kv_head, kv_head * group + skipped, group - skipped < kHeads ? group - skipped : kHeads};
}

// The keys of a page that are seen: begin .. end; none where begin >= end.
struct Bounds {
  int begin, end;
  __device__ bool any() const { return begin < end; }
  __device__ bool has(int key) const { return key >= begin && key < end; }
  // Some, or all, of keys first .. first + n.
  __device__ bool sees(int first, int n) const { return first < end && first + n > begin; }
  __device__ bool whole(int first, int n) const { return first >= begin && first + n <= end; }
};

// Keys that are all seen: as Bounds, but nothing is left to test or to branch on.
struct AllSeen {
  __device__ static constexpr bool has(int) { return true; }
  __device__ static constexpr bool sees(int, int) { return true; }
  __device__ static constexpr bool whole(int, int) { return true; }
};

__device__ __forceinline__ Bounds bounds_of(int first_key, int end_key, int page) {
  const int at = page * kPage;
  return {first_key > at ? first_key - at : 0, end_key - at < kPage ? end_key - at : kPage};
}

// ------------------------------------------------------------------------------------------------- pages in shared memory
// As in the cache, but chunk c of 16 bytes of row r lies at c ^ (r % 8): ldmatrix reads 8 rows' chunks without conflicts.

// Rows first .. first + n of a page's keys, of the tiles that are seen. A round of the threads is kRows rows, which divide 8 or
// are a multiple of it, as `first` is.
template <int kThreads, int n>
__device__ __forceinline__ void copy_keys(uint8_t* to, const uint16_t* keys, int thread, int first, Bounds bounds) {
  constexpr int kRows = kThreads / 8;
  const int row = thread / 8, chunk = thread % 8, place = (chunk ^ row % 8) * 16;
  to += (first + row) * 128;
  keys += (first + row) * kDim + chunk * 8;
#pragma unroll
  for (int r = 0; r < n; r += kRows)
    if (bounds.sees((first + row + r) / 16 * 16, 16)) copy_async(to + r * 128 + (place ^ r % 8 * 16), keys + r * kDim, 16);
}

template <int kThreads, int n>
__device__ __forceinline__ void copy_values(uint8_t* to, const uint16_t* values, int thread, int first, Bounds bounds) {
  constexpr int kRows = kThreads / 16;
  const int row = thread / 16, chunk = thread % 16, place = (chunk ^ row % 8) * 16;
  if (!bounds.sees(chunk / 2 * 16, 16)) return;
  to += (first + row) * 256;
  values += (first + row) * kPage + chunk * 8;
#pragma unroll
  for (int r = 0; r < n; r += kRows) copy_async(to + r * 256 + (place ^ r % 8 * 16), values + r * kPage, 16);
}

// Tile (rows 16 i .., columns 16 j ..) of an array of rows of `row_bytes`.
template <int row_bytes>
__device__ __forceinline__ FragmentA load_tile(const uint8_t* array, int i, int j) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, r = lane % 8, matrix = lane / 8;
  const int row = i * 16 + matrix % 2 * 8 + r, chunk = 2 * j + matrix / 2;
  return ldmatrix<false>(array + row * row_bytes + (chunk ^ r) * 16);
}

// ---------------------------------------------------------------------------------------------------------- arithmetic

// Lane 4g + c has heads 2c and 2c + 1 of: maxima (log 2); sums over its own keys, those that are g modulo 8; and of n tiles of
// 16 dimensions the dimensions g and g + 8.
template <int n>
struct State {
  float m[2], l[2];
  FragmentC o[n];
};

template <int n>
__device__ __forceinline__ void reset(State<n>& s) {
  s.m[0] = s.m[1] = -INFINITY;
  s.l[0] = s.l[1] = 0;
#pragma unroll
  for (int t = 0; t < n; ++t) s.o[t] = {{0, 0, 0, 0}};
}

template <int n>
__device__ __forceinline__ void start_with_sinks(State<n>& s, const float* sinks, const Heads& heads) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, c = lane % 4;
  reset(s);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sink = 2 * c + i < heads.n ? sinks[heads.first + 2 * c + i] : 0.f;
    s.m[i] = ceilf(fmaxf(sink * kLog2e, -1e30f));
    s.l[i] = g == 0 ? exp2_fast(fmaf(sink, kLog2e, -s.m[i]) + sink * kLog2eRest) : 0.f;
  }
}

// 2^x of a whole number x <= 0, exactly. 0 for what float32 has no normal number for, and for NaN.
__device__ __forceinline__ float power_of_two(float x) {
  return x >= -126.f ? __uint_as_float(static_cast<uint32_t>(static_cast<int>(x) + 127) << 23) : 0.f;
}

template <int n>
__device__ __forceinline__ void rescale(State<n>& s, const float (&factor)[2]) {
  if (!__any_sync(kAllLanes, factor[0] != 1.f || factor[1] != 1.f)) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) s.l[i] *= factor[i];
#pragma unroll
  for (int t = 0; t < n; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s.o[t].v[i] *= factor[i % 2];
  }
}

// The maximum that makes room for scores the largest of which is given.
__device__ __forceinline__ float raised(float m, float largest) { return fmaxf(m, ceilf(largest * kScale)); }

template <int n>
__device__ __forceinline__ void raise(State<n>& s, const float (&largest)[2]) {
  float keep[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float top = raised(s.m[i], largest[i]);
    keep[i] = power_of_two(s.m[i] - top);
    s.m[i] = top;
  }
  rescale(s, keep);
}

template <int n>
__device__ __forceinline__ void join(State<n>& total, const State<n>& span) {
  float keep[2], factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float top = fmaxf(total.m[i], span.m[i]);
    keep[i] = power_of_two(total.m[i] - top);
    factor[i] = power_of_two(span.m[i] - top);
    total.m[i] = top;
  }
  rescale(total, keep);
#pragma unroll
  for (int i = 0; i < 2; ++i) total.l[i] = fmaf(factor[i], span.l[i], total.l[i]);
#pragma unroll
  for (int t = 0; t < n; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) total.o[t].v[i] = fmaf(factor[i % 2], span.o[t].v[i], total.o[t].v[i]);
  }
}

__device__ __forceinline__ void load_query(FragmentB (&q)[kSteps], const AttentionArgs& a, int64_t row, const Heads& heads) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, c = lane % 4;
  const float2* from = reinterpret_cast<const float2*>(a.q + (row * a.heads + heads.first + g) * kDim) + c;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const bool real = g < heads.n;
    const float2 u = real ? from[step * 8] : float2{0.f, 0.f}, v = real ? from[step * 8 + 4] : float2{0.f, 0.f};
    q[step] = {pack_bf16(u.x, u.y), pack_bf16(v.x, v.y)};
  }
}

// Scores of a quarter of a page's keys for n rows, to two tiles of each row; -infinity for keys that are not seen.
template <int n, int kTiles, class Seen>
__device__ __forceinline__ void score(FragmentC (&s)[n][kTiles], int at, const FragmentB (&q)[n][kSteps], const uint8_t* keys,
                                      int quarter, const Seen (&seen)[n]) {
  bool any = false;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      any = any || seen[j].sees(quarter * 32 + t * 16, 16);
      s[j][at + t] = {{0, 0, 0, 0}};
    }
  }
  if (any) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const FragmentA k = load_tile<kDim * 2>(keys, quarter * 2 + t, step);
#pragma unroll
        for (int j = 0; j < n; ++j) mma(s[j][at + t], k, q[j][step]);
      }
    }
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const int key = quarter * 32 + t * 16;
      if (seen[j].whole(key, 16)) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][at + t].v[i] = seen[j].has(key + lane / 4 + i / 2 * 8) ? s[j][at + t].v[i] : -INFINITY;
    }
  }
}

// Over the eight lanes that share heads.
__device__ __forceinline__ float column_max(float v) {
#pragma unroll
  for (int mask = 4; mask < kWarp; mask *= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, mask));
  return v;
}

// Of n tiles of scores.
template <int n>
__device__ __forceinline__ void find_largest(float (&largest)[2], const FragmentC (&s)[n]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    largest[i] = -INFINITY;
#pragma unroll
    for (int t = 0; t < n; ++t) largest[i] = fmaxf(largest[i], fmaxf(s[t].v[i], s[t].v[i + 2]));
    largest[i] = column_max(largest[i]);
  }
}

// Scores to p.
__device__ __forceinline__ void exponentiate(FragmentC& s, const float (&m)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) s.v[i] = exp2_fast(fmaf(s.v[i], kScale, -m[i % 2]));
}
// Of head i over the lane's own keys of two tiles.
__device__ __forceinline__ float quarter_sum(const FragmentC& p, const FragmentC& next, int i) {
  return ((p.v[i] + p.v[i + 2]) + next.v[i]) + next.v[i + 2];
}

// p as upper and lower halves, heads 2c and 2c + 1 in a word: of key g, and of key g + 8.
struct Weights {
  uint32_t high[2], low[2];
};
__device__ __forceinline__ Weights split(const FragmentC& p) {
  Weights w;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float u = p.v[2 * i], v = p.v[2 * i + 1];
    w.high[i] = pack_bf16(u, v);
    w.low[i] = pack_bf16(u - bf16_low(w.high[i]), v - bf16_high(w.high[i]));
  }
  return w;
}

// 0 for the values of keys that are not seen.
template <class Seen>
__device__ __forceinline__ FragmentA mask_values(FragmentA v, int tile, Seen seen) {
  const int key = tile * 16 + static_cast<int>(threadIdx.x) % 4 * 2;
  uint32_t masks[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    masks[i] = (seen.has(key + i * 8) ? 0x0000ffffu : 0) | (seen.has(key + i * 8 + 1) ? 0xffff0000u : 0);
  return {v.a0 & masks[0], v.a1 & masks[0], v.a2 & masks[1], v.a3 & masks[1]};
}

// o += V p of 16 keys, n tiles of dimensions.
template <int n, class Seen>
__device__ __forceinline__ void weigh(State<n>& s, const FragmentA (&values)[n], FragmentB high, FragmentB low, int tile,
                                      Seen seen) {
  FragmentA v[n];
#pragma unroll
  for (int t = 0; t < n; ++t) {
    v[t] = seen.whole(tile * 16, 16) ? values[t] : mask_values(values[t], tile, seen);
    mma(s.o[t], v[t], high);
  }
#pragma unroll
  for (int t = 0; t < n; ++t) mma(s.o[t], v[t], low);
}

// o / l of dimensions first_dim .. to the result.
template <int n>
__device__ __forceinline__ void finish(const AttentionArgs& a, int64_t row, const Heads& heads, const State<n>& s,
                                       int first_dim) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, c = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float l = s.l[i];
#pragma unroll
    for (int mask = 4; mask < kWarp; mask *= 2) l += __shfl_xor_sync(kAllLanes, l, mask);
    if (2 * c + i >= heads.n) continue;
    l = 1.f / l;
    const int64_t at = (heads.first + 2 * c + i) * kDim + first_dim + g;
#pragma unroll
    for (int t = 0; t < n; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float value = s.o[t].v[2 * half + i] * l;
        const int64_t dim = at + t * 16 + half * 8;
        a.out[row * a.heads * kDim + dim] = value;
        a.rounded.data[row * a.rounded.stride + dim] = static_cast<uint16_t>(pack_bf16(value, 0.f));
      }
    }
  }
}

}  // namespace
}  // namespace gptoss::cuda
