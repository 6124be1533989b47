// Causal attention with one sink logit a head, over a paged cache, for rows of a ragged batch: each row sees the keys up to its
// own position, or the last `window` of them.
//
// The unit of work is a warp: one row, one key/value head, up to 16 of its query heads, which are the rows of the mma tile. A
// page of 128 keys is taken at once: its scores (q k^T / 8), their maximum m, p = exp(score - m), their sum l, and o = p V.
// Pages then join a running state in order, which starts with the sink: m = sink, l = 1, o = 0; so the sink counts once, in the
// maximum and the denominator. Pages are absolute, so the sums do not depend on how a prompt was cut.
//   few rows:  one warp a page, the parts go through memory and a second kernel joins them (split keys)
//   many rows: one warp goes through all pages of its row
// Both do the same arithmetic in the same order: a row has the same bits in either.
// p is float32: its upper and lower bfloat16 halves are multiplied separately, 16 bits of mantissa. Keys outside the row's
// range are masked and their values replaced by 0, so nothing that lies there can leak.
//
// Bytes: 256 a key and key/value head. Operations: 256 a key and query head, of which half the tile is used with 8 heads.
#include "cuda/kernels.h"

namespace gptoss::cuda {
namespace {

constexpr int kPage = 128, kDim = 64, kHeads = 16, kWarps = 4;
constexpr int kPartFloats = kHeads * (kDim + 2);  // one page's part: o [16, 64], m [16], l [16]

// A warp's state over 16 heads: lane 4g + c has heads g and g + 8, of each 8 dimensions 2c and 2c + 1.
struct State {
  FragmentC o[kDim / 8];
  float m[2], l[2];
};

struct Unit {
  int64_t row, kv_head, first_head, n_heads;
  int64_t first_key, end_key;
  const int32_t* pages;  // by absolute page number
};

// Unit u: passes over the heads of a key/value head are slowest, rows fastest, so that warps of a block share keys.
__device__ __forceinline__ Unit find_unit(const AttentionArgs& a, int64_t u) {
  const int64_t group = a.heads / a.kv_heads, pass = u / a.n / a.kv_heads;
  Unit unit;
  unit.row = u % a.n;
  unit.kv_head = u / a.n % a.kv_heads;
  unit.first_head = unit.kv_head * group + pass * kHeads;
  unit.n_heads = group - pass * kHeads < kHeads ? group - pass * kHeads : kHeads;
  unit.end_key = a.batch.positions[unit.row] + 1;
  unit.first_key = a.window && unit.end_key > a.window ? unit.end_key - a.window : 0;
  unit.pages = a.batch.pages + (a.window ? a.batch.window_base : a.batch.full_base)[a.batch.sequence_of[unit.row]];
  return unit;
}

__device__ __forceinline__ void load_query(FragmentA (&q)[4], const AttentionArgs& a, const Unit& unit) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, c = lane % 4;
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    uint32_t pairs[2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (g + half * 8 >= unit.n_heads) continue;
      const float* from = a.q + unit.row * a.heads * kDim + (unit.first_head + g + half * 8) * kDim + b * 32 + c * 8;
      const float4 u = reinterpret_cast<const float4*>(from)[0], v = reinterpret_cast<const float4*>(from)[1];
      pairs[half][0] = pack_bf16(u.x, u.y);
      pairs[half][1] = pack_bf16(u.z, u.w);
      pairs[half][2] = pack_bf16(v.x, v.y);
      pairs[half][3] = pack_bf16(v.z, v.w);
    }
    q[2 * b] = {pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]};
    q[2 * b + 1] = {pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3]};
  }
}

// Scores of the page's keys begin .. end, -infinity for the others. Tile 4 i + j, column n is key 32 i + 8 (n / 2) + 2 j + n %
// 2: so a lane's scores of a block of 32 are those of keys 8c .. 8c+7, the ones whose values it will load.
__device__ __forceinline__ void page_scores(FragmentC (&s)[kPage / 8], const FragmentA (&q)[4], const uint16_t* keys, int begin,
                                            int end) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, c = lane % 4;
#pragma unroll
  for (int tile = 0; tile < kPage / 8; ++tile) {
    const int block = tile / 4 * 32, j = tile % 4;
    s[tile] = {{0, 0, 0, 0}};
    if (block < end && block + 32 > begin) {
      const uint16_t* key = keys + (block + g / 2 * 8 + 2 * j + g % 2) * kDim + c * 8;
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const uint4 k = *reinterpret_cast<const uint4*>(key + b * 32);
        mma(s[tile], q[2 * b], {k.x, k.y});
        mma(s[tile], q[2 * b + 1], {k.z, k.w});
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = block + 8 * c + 2 * j + i % 2;
      s[tile].v[i] = at >= begin && at < end ? s[tile].v[i] * 0.125f : -INFINITY;
    }
  }
}

// Over the four lanes that share a head.
__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, 1));
  return fmaxf(v, __shfl_xor_sync(kAllLanes, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}

// Keeps the values of keys begin .. end among eight, the first of which is key `at`.
__device__ __forceinline__ uint4 mask_values(uint4 v, int at, int begin, int end) {
  uint32_t* words = &v.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int first = at + 2 * i;
    uint32_t mask = first >= begin && first < end ? 0x0000ffffu : 0;
    mask |= first + 1 >= begin && first + 1 < end ? 0xffff0000u : 0;
    words[i] &= mask;
  }
  return v;
}

// o = p V. Values of a page: [64 dimensions, 128 keys].
__device__ __forceinline__ void weigh_values(FragmentC (&o)[kDim / 8], const FragmentC (&p)[kPage / 8], const uint16_t* values,
                                             int begin, int end) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, c = lane % 4;
#pragma unroll
  for (int block = 0; block < 4; ++block) {
    if (block * 32 >= end || block * 32 + 32 <= begin) continue;
    FragmentA high[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const FragmentC &u = p[4 * block + 2 * i], &v = p[4 * block + 2 * i + 1];
      high[i] = {pack_bf16(u.v[0], u.v[1]), pack_bf16(u.v[2], u.v[3]), pack_bf16(v.v[0], v.v[1]), pack_bf16(v.v[2], v.v[3])};
      const auto rest = [](float a, float b, uint32_t h) { return pack_bf16(a - bf16_low(h), b - bf16_high(h)); };
      low[i] = {rest(u.v[0], u.v[1], high[i].a0), rest(u.v[2], u.v[3], high[i].a1), rest(v.v[0], v.v[1], high[i].a2),
                rest(v.v[2], v.v[3], high[i].a3)};
    }
    const bool whole = block * 32 >= begin && block * 32 + 32 <= end;
#pragma unroll
    for (int t = 0; t < kDim / 8; ++t) {
      uint4 v = *reinterpret_cast<const uint4*>(values + (t * 8 + g) * kPage + block * 32 + c * 8);
      if (!whole) v = mask_values(v, block * 32 + c * 8, begin, end);
      mma(o[t], high[0], {v.x, v.y});
      mma(o[t], low[0], {v.x, v.y});
      mma(o[t], high[1], {v.z, v.w});
      mma(o[t], low[1], {v.z, v.w});
    }
  }
}

__device__ __forceinline__ void attend_page(State& part, const AttentionArgs& a, const Unit& unit, const FragmentA (&q)[4],
                                            int64_t page) {
  const int64_t offset = (static_cast<int64_t>(unit.pages[page]) * a.kv_heads + unit.kv_head) * kPage * kDim;
  const int64_t first = page * kPage;
  const int begin = unit.first_key > first ? static_cast<int>(unit.first_key - first) : 0;
  const int end = unit.end_key < first + kPage ? static_cast<int>(unit.end_key - first) : kPage;
  FragmentC s[kPage / 8];
  page_scores(s, q, a.keys + offset, begin, end);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = -INFINITY, sum = 0;
#pragma unroll
    for (int tile = 0; tile < kPage / 8; ++tile) largest = fmaxf(largest, fmaxf(s[tile].v[2 * half], s[tile].v[2 * half + 1]));
    largest = quad_max(largest);
#pragma unroll
    for (int tile = 0; tile < kPage / 8; ++tile) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) sum += s[tile].v[i] = expf(s[tile].v[i] - largest);
    }
    part.m[half] = largest;
    part.l[half] = quad_sum(sum);
  }
#pragma unroll
  for (int t = 0; t < kDim / 8; ++t) part.o[t] = {{0, 0, 0, 0}};
  weigh_values(part.o, s, a.values + offset, begin, end);
}

// How a page's part joins the running state: o = keep o + join o'.
struct Join {
  float keep, join;
};
__device__ __forceinline__ Join join_page(float& m, float& l, float page_m, float page_l) {
  const float top = fmaxf(m, page_m);
  const Join j = {expf(m - top), expf(page_m - top)};
  l = fmaf(j.join, page_l, l * j.keep);
  m = top;
  return j;
}
__device__ __forceinline__ float joined(Join j, float o, float page_o) { return fmaf(j.join, page_o, o * j.keep); }

__device__ __forceinline__ void store_pair(const AttentionArgs& a, int64_t row, int64_t head, int dim, float first,
                                           float second) {
  const int64_t at = head * kDim + dim;
  *reinterpret_cast<float2*>(a.out + row * a.heads * kDim + at) = {first, second};
  *reinterpret_cast<uint32_t*>(a.rounded.data + row * a.rounded.stride + at) = pack_bf16(first, second);
}

__global__ void __launch_bounds__(kWarps* kWarp) attention_kernel(AttentionArgs a, int64_t n_units) {
  wait_for_previous();
  const int64_t u = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (u >= n_units) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, c = lane % 4;
  const Unit unit = find_unit(a, u);
  FragmentA q[4];
  load_query(q, a, unit);
  State state;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.m[half] = g + half * 8 < unit.n_heads ? a.sinks[unit.first_head + g + half * 8] : 0.f;
    state.l[half] = 1;
  }
#pragma unroll
  for (int t = 0; t < kDim / 8; ++t) state.o[t] = {{0, 0, 0, 0}};
  for (int64_t page = unit.first_key / kPage; page * kPage < unit.end_key; ++page) {
    State part;
    attend_page(part, a, unit, q, page);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Join j = join_page(state.m[half], state.l[half], part.m[half], part.l[half]);
#pragma unroll
      for (int t = 0; t < kDim / 8; ++t) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) state.o[t].v[i] = joined(j, state.o[t].v[i], part.o[t].v[i]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (g + half * 8 >= unit.n_heads) continue;
#pragma unroll
    for (int t = 0; t < kDim / 8; ++t)
      store_pair(a, unit.row, unit.first_head + g + half * 8, t * 8 + 2 * c, state.o[t].v[2 * half] / state.l[half],
                 state.o[t].v[2 * half + 1] / state.l[half]);
  }
}

// One warp a page; parts to memory: [unit, page of the row][o [16, 64], m [16], l [16]].
__global__ void __launch_bounds__(kWarps* kWarp) attention_split_kernel(AttentionArgs a, int64_t n_units) {
  wait_for_previous();
  const int64_t w = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t u = w % n_units, part_index = w / n_units;
  if (part_index >= a.max_pages) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, c = lane % 4;
  const Unit unit = find_unit(a, u);
  const int64_t page = unit.first_key / kPage + part_index;
  if (page * kPage >= unit.end_key) return;
  FragmentA q[4];
  load_query(q, a, unit);
  State part;
  attend_page(part, a, unit, q, page);
  float* to = a.partial + (u * a.max_pages + part_index) * kPartFloats;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = g + half * 8;
    if (head >= unit.n_heads) continue;
#pragma unroll
    for (int t = 0; t < kDim / 8; ++t)
      *reinterpret_cast<float2*>(to + head * kDim + t * 8 + 2 * c) = {part.o[t].v[2 * half], part.o[t].v[2 * half + 1]};
    if (c == 0) {
      to[kHeads * kDim + head] = part.m[half];
      to[kHeads * kDim + kHeads + head] = part.l[half];
    }
  }
}

// A block of 32 threads joins the parts of one unit's head; a thread has two dimensions.
__global__ void __launch_bounds__(kWarp) attention_join_kernel(AttentionArgs a) {
  wait_for_previous();
  const int64_t u = blockIdx.x / kHeads;
  const int head = static_cast<int>(blockIdx.x % kHeads), dim = static_cast<int>(threadIdx.x) * 2;
  const Unit unit = find_unit(a, u);
  if (head >= unit.n_heads) return;
  float m = a.sinks[unit.first_head + head], l = 1, first = 0, second = 0;
  const float* part = a.partial + u * a.max_pages * kPartFloats;
  for (int64_t page = unit.first_key / kPage; page * kPage < unit.end_key; ++page, part += kPartFloats) {
    const Join j = join_page(m, l, part[kHeads * kDim + head], part[kHeads * kDim + kHeads + head]);
    first = joined(j, first, part[head * kDim + dim]);
    second = joined(j, second, part[head * kDim + dim + 1]);
  }
  store_pair(a, unit.row, unit.first_head + head, dim, first / l, second / l);
}

int64_t units(const AttentionArgs& a) { return a.n * a.kv_heads * ceil_div(a.heads / a.kv_heads, kHeads); }

// Rows enough to fill the card are not split; nor is one page, nor what needs more work space than is worth it. The bounds
// are for a card of 132 multiprocessors and not tuned yet.
bool is_split(const AttentionArgs& a) {
  constexpr int64_t kMaxUnits = 1024, kMaxFloats = int64_t{128} << 20;
  return a.max_pages > 1 && units(a) <= kMaxUnits && units(a) * a.max_pages * kPartFloats <= kMaxFloats;
}

Launch launch_of(int64_t blocks, int threads, cudaStream_t stream) {
  CHECK(blocks < int64_t{1} << 31, "attention of ", blocks, " blocks is too large for one launch");
  return {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), 0, stream};
}

}  // namespace

int64_t attention_partial_bytes(const AttentionArgs& args) {
  return is_split(args) ? units(args) * args.max_pages * kPartFloats * static_cast<int64_t>(sizeof(float)) : 0;
}

void attention(const AttentionArgs& args, cudaStream_t stream) {
  const int64_t n_units = units(args);
  if (!is_split(args)) {
    launch(launch_of(ceil_div(n_units, kWarps), kWarps * kWarp, stream), attention_kernel, args, n_units);
    return;
  }
  launch(launch_of(ceil_div(n_units * args.max_pages, kWarps), kWarps * kWarp, stream), attention_split_kernel, args, n_units);
  launch(launch_of(n_units * kHeads, kWarp, stream), attention_join_kernel, args);
}

}  // namespace gptoss::cuda
