// Causal attention with one sink logit a head, over a paged cache, for rows of a ragged batch: each row sees the keys up to its
// own position, or the last `window` of them.
//
// A unit is a row, a key/value head, and up to 8 of its query heads. The heads are the columns (N) of every mma tile; its rows
// (M) are 16 keys in S = K q^T, and 16 dimensions in O = V P^T, so that pages of keys [128, 64] and of values [64, 128] are the
// A operands as they lie in the cache, and no part of a tile is wasted with the 8 heads a group of gpt-oss.
//
// A row's pages are cut into up to 32 spans of equal length. Within a span, half pages join a running state (m, l, o), as in an
// online softmax; then the spans join, in order, a state that starts with the sink: so it counts once, in the maximum and the
// denominator. m is the maximum in powers of two, rounded up: exp(s / 8 - max) = 2^(s c - m) times a power of two, so to
// rescale is exact, needs no exponential, and is seldom needed. All of this is a function of the row's position alone: a
// row has the same bits in either kernel and in any cut.
//   attention_rows:   a block of 4 warps takes some spans of a unit. A warp scores a quarter of a page's keys, then weighs all
//                     128 for a quarter of the dimensions. Where a unit has several blocks, spans go to memory and the
//                     block that comes last joins them.
//   attention_blocks: a block of 8 warps takes up to 16 consecutive rows of a sequence, a warp two of them; pages go through
//                     shared memory once for all.
// p is float32: its upper and lower bfloat16 halves are multiplied separately, 16 bits of mantissa. Keys outside the row's
// range are masked and their values replaced by 0, so nothing that lies there can leak; tiles of 16 of them are skipped.
//
// Bytes: 256 a key and key/value head, once for a row, or for a block of rows. Operations: 384 a key and query head (256, and
// the lower halves).
#include "cuda/attention.cuh"

#include <algorithm>
#include <bit>

namespace gptoss::cuda {
namespace {

constexpr int kWholePages = 4;                              // a row of so few pages is one block's work
constexpr int kRowWarps = 4, kQuarter = kPage / kRowWarps;  // attention_rows
constexpr int kBlockWarps = kRowBlock / 2;                  // attention_blocks

// ------------------------------------------------------------------------------------------------------ rows by themselves

// One span's state, 16 dimensions a warp.
struct Part {
  float4 o[kRowWarps][kWarp];
  float2 l[kWarp], m[4];
};
constexpr int64_t kMaxUnits = 1024;               // that are split; their parts take 76 MB at most
constexpr int64_t kCounterBytes = kMaxUnits * 4;  // how many spans of each are there

struct RowShared {
  uint8_t keys[2][kPageBytes], values[2][kPageBytes];  // two pages on their way
  uint32_t weights[2][kPageTiles][16][4];              // upper, lower halves: [key][heads 2c, 2c + 1]
  float2 sums[kRowWarps][kWarp];
  float2 largest[kRowWarps][4];
  int is_last;
};

// The pages of a row that a block takes, and their copies: each warp copies what it alone will read, the keys it scores and
// the dimensions it weighs, and holds 32 page numbers at a time.
struct PageStream {
  const AttentionArgs& a;
  const Sight& sight;
  const int32_t* pages;  // of the row, from the first that it sees
  RowShared& shared;
  int kv_head, first, end;  // of the row's pages
  int32_t numbers = 0;      // of pages first + 32 i + lane
  int64_t offset = 0;       // in the cache, of the page copied last

  __device__ Bounds bounds(int page) const { return bounds_of(sight.first_key, sight.end_key, sight.first_page + page); }

  __device__ void start_keys(int page) {
    if (page < end) {
      const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
      const int i = page - first;
      if (i % kWarp == 0) numbers = pages[page + lane < end ? page + lane : end - 1];
      offset = (int64_t{__shfl_sync(kAllLanes, numbers, i % kWarp)} * a.kv_heads + kv_head) * (kPage * kDim);
      copy_keys<kWarp, kQuarter>(shared.keys[i % 2], a.keys + offset, lane, warp * kQuarter, bounds(page));
    }
    commit_copies();
  }
  __device__ void start_values(int page) {
    if (page < end) {
      const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
      copy_values<kWarp, 16>(shared.values[(page - first) % 2], a.values + offset, lane, warp * 16, bounds(page));
    }
    commit_copies();
  }
};

// o += V p of half a page, for a quarter of the dimensions.
template <class Seen>
__device__ __forceinline__ void weigh_quarter(State<1>& span, const RowShared& shared, const uint8_t* values, int half,
                                              Seen seen) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int t = 0; t < kHalfTiles; ++t) {
    const int tile = half * kHalfTiles + t;
    if (!seen.sees(tile * 16, 16)) continue;
    const FragmentA w = ldmatrix<true>(&shared.weights[lane / 16][tile][lane % 16][0]);
    const FragmentA v[1] = {load_tile<kPage * 2>(values, warp, tile)};
    weigh(span, v, {w.a0, w.a1}, {w.a2, w.a3}, tile, seen);
  }
}

// Joins a page to the span's state. Three groups of copies may be on their way beside the one needed next.
__device__ __forceinline__ void attend_row(State<1>& span, PageStream& stream, const FragmentB (&q)[1][kSteps], int page) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp, g = lane / 4,
            c = lane % 4;
  RowShared& shared = stream.shared;
  const Bounds bounds = stream.bounds(page);
  const int stage = (page - stream.first) % 2;
  wait_copies<3>();
  __syncwarp();
  FragmentC p[1][2];
  score(p, 0, q, shared.keys[stage], warp, {bounds});
  float largest[2];
  find_largest(largest, p[0]);
  if (g == 0) shared.largest[warp][c] = {largest[0], largest[1]};
  __syncthreads();
  stream.start_keys(page + 2);
  float halves[2][2], m[2] = {span.m[0], span.m[1]};  // the largest of each half; m for this warp's own
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float2 u = shared.largest[2 * h][c], v = shared.largest[2 * h + 1][c];
    halves[h][0] = fmaxf(u.x, v.x);
    halves[h][1] = fmaxf(u.y, v.y);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (h <= warp / 2) m[i] = raised(m[i], halves[h][i]);
  }
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    exponentiate(p[0][t], m);
    const Weights w = split(p[0][t]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      shared.weights[0][warp * 2 + t][g + i * 8][c] = w.high[i];
      shared.weights[1][warp * 2 + t][g + i * 8][c] = w.low[i];
    }
  }
  shared.sums[warp][lane] = {quarter_sum(p[0][0], p[0][1], 0), quarter_sum(p[0][0], p[0][1], 1)};
  wait_copies<3>();
  __syncthreads();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (!bounds.sees(h * kHalf, kHalf)) continue;
    const float2 u = shared.sums[2 * h][lane], v = shared.sums[2 * h + 1][lane];
    raise(span, halves[h]);
    span.l[0] += u.x + v.x;
    span.l[1] += u.y + v.y;
    if (bounds.whole(h * kHalf, kHalf))
      weigh_quarter(span, shared, shared.values[stage], h, AllSeen());
    else
      weigh_quarter(span, shared, shared.values[stage], h, bounds);
  }
  __syncwarp();
  stream.start_values(page + 2);
}

__device__ __forceinline__ void store_part(Part& part, const State<1>& s) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  part.o[warp][lane] = {s.o[0].v[0], s.o[0].v[1], s.o[0].v[2], s.o[0].v[3]};
  if (warp == 0) part.l[lane] = {s.l[0], s.l[1]};
  if (warp == 0 && lane < 4) part.m[lane] = {s.m[0], s.m[1]};
}

// Whether all spans of the unit are there, now that this block has stored `n` of them.
__device__ __forceinline__ bool comes_last(int* counter, int n, int spans, int& is_last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(counter, n) + n == spans;
    if (is_last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

__device__ __forceinline__ void join_parts(State<1>& total, const Part* parts, int spans) {
  constexpr int kTogether = 8;  // parts on their way
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int first = 0; first < spans; first += kTogether) {
    State<1> part[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const Part& from = parts[first + i < spans ? first + i : spans - 1];
      const float4 o = load_fresh(&from.o[warp][lane]);
      const float2 l = load_fresh(&from.l[lane]), m = load_fresh(&from.m[lane % 4]);
      part[i] = {{m.x, m.y}, {l.x, l.y}, {{{o.x, o.y, o.z, o.w}}}};
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (first + i < spans) join(total, part[i]);
  }
}

// Block: a row, a unit of it, a slice of its spans. `stride` parts a unit in the work space.
__global__ void __launch_bounds__(kRowWarps* kWarp, 3)
    attention_rows_kernel(AttentionArgs a, int group, int passes, int stride) {
  let_next_start();
  const int index = static_cast<int>(blockIdx.x), slice = static_cast<int>(blockIdx.z), slices = static_cast<int>(gridDim.z);
  const int unit = static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x);  // of the launch
  const Heads heads = find_heads(static_cast<int>(blockIdx.y), group, passes);
  wait_for_previous();
  if (a.batch.n_rows && index >= *a.batch.n_rows) return;
  const int row = a.batch.single_rows ? a.batch.single_rows[index] : index;
  const Sight sight = sight_of(a.batch.positions[row] + 1, static_cast<int>(a.window));
  const int spans = sight.spans();
  const int spans_a_block = sight.n_pages <= kWholePages ? spans : spans <= slices ? 1 : (spans + slices - 1) / slices;
  const int first_span = slice * spans_a_block;
  if (first_span >= spans) return;
  const int end_span = first_span + spans_a_block < spans ? first_span + spans_a_block : spans;
  const bool alone = spans_a_block >= spans;
  const auto end_of = [&](int span) {
    return (span + 1) * sight.span < sight.n_pages ? (span + 1) * sight.span : sight.n_pages;
  };

  RowShared& shared = *shared_memory<RowShared>();
  PageStream stream{
      a, sight, page_numbers(a, row) + sight.first_page, shared, heads.kv_head, first_span * sight.span, end_of(end_span - 1)};
  for (int page = stream.first; page < stream.first + 2; ++page) {
    stream.start_keys(page);
    stream.start_values(page);
  }
  FragmentB q[1][kSteps];
  load_query(q[0], a, row, heads);
  Part* parts = reinterpret_cast<Part*>(static_cast<uint8_t*>(a.workspace) + kCounterBytes) + int64_t{unit} * stride;
  State<1> total, span;
  start_with_sinks(total, a.sinks, heads);
  int page = stream.first;
  for (int s = first_span; s < end_span; ++s) {
    reset(span);
    for (; page < end_of(s); ++page) attend_row(span, stream, q, page);
    if (alone)
      join(total, span);
    else
      store_part(parts[s], span);
  }
  if (!alone) {
    if (!comes_last(static_cast<int*>(a.workspace) + unit, end_span - first_span, spans, shared.is_last)) return;
    join_parts(total, parts, spans);
  }
  finish(a, row, heads, total, static_cast<int>(threadIdx.x) / kWarp * 16);
}

// ---------------------------------------------------------------------------------------------------------- blocks of rows

struct BlockShared {
  uint8_t keys[2][kPageBytes], values[2][kPageBytes];
};

// Joins half a page to the states of a warp's two rows.
template <class Seen>
__device__ __forceinline__ void attend_two(State<kDimTiles> (&span)[2], const FragmentB (&q)[2][kSteps], const uint8_t* keys,
                                           const uint8_t* values, int half, const Seen (&seen)[2]) {
  FragmentC p[2][kHalfTiles];
  score(p, 0, q, keys, half * 2, seen);
  score(p, 2, q, keys, half * 2 + 1, seen);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (!seen[j].sees(half * kHalf, kHalf)) continue;
    float largest[2];
    find_largest(largest, p[j]);
    raise(span[j], largest);
#pragma unroll
    for (int t = 0; t < kHalfTiles; ++t) exponentiate(p[j][t], span[j].m);
#pragma unroll
    for (int i = 0; i < 2; ++i) span[j].l[i] += quarter_sum(p[j][0], p[j][1], i) + quarter_sum(p[j][2], p[j][3], i);
  }
#pragma unroll
  for (int t = 0; t < kHalfTiles; ++t) {
    const int tile = half * kHalfTiles + t;
    if (!seen[0].sees(tile * 16, 16) && !seen[1].sees(tile * 16, 16)) continue;
    FragmentA v[kDimTiles];
#pragma unroll
    for (int d = 0; d < kDimTiles; ++d) v[d] = load_tile<kPage * 2>(values, d, tile);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!seen[j].sees(tile * 16, 16)) continue;
      const Weights w = split(p[j][t]);
      const FragmentB high = {movmatrix(w.high[0]), movmatrix(w.high[1])}, low = {movmatrix(w.low[0]), movmatrix(w.low[1])};
      weigh(span[j], v, high, low, tile, seen[j]);
    }
  }
}

__global__ void __launch_bounds__(kBlockWarps* kWarp, 1) attention_blocks_kernel(AttentionArgs a, int group, int passes) {
  constexpr int kThreads = kBlockWarps * kWarp;
  let_next_start();
  const Heads heads = find_heads(static_cast<int>(blockIdx.x), group, passes);
  wait_for_previous();
  const RowBlock block = a.batch.row_blocks[gridDim.y - 1 - blockIdx.y];  // the last rows, which see most, go first
  const int thread = static_cast<int>(threadIdx.x), local = thread / kWarp * 2, window = static_cast<int>(a.window);
  const int position = a.batch.positions[block.first], end_key = position + block.n;
  const int first_page = sight_of(position + 1, window).first_page, end_page = (end_key - 1) / kPage + 1;
  const auto sight_of_row = [&](int j) { return sight_of(position + local + j + 1, window); };
  BlockShared& shared = *shared_memory<BlockShared>();

  const auto start_page = [&](int page, int32_t number) {
    const int64_t offset = (int64_t{number} * a.kv_heads + heads.kv_head) * (kPage * kDim);
    const Bounds any_row = bounds_of(sight_of(position + 1, window).first_key, end_key, page);
    copy_keys<kThreads, kPage>(shared.keys[page % 2], a.keys + offset, thread, 0, any_row);
    copy_values<kThreads, kDim>(shared.values[page % 2], a.values + offset, thread, 0, any_row);
  };
  const int32_t* numbers = page_numbers(a, block.first);
  start_page(first_page, numbers[first_page]);
  int32_t next = first_page + 1 < end_page ? numbers[first_page + 1] : 0;

  FragmentB q[2][kSteps];
  State<kDimTiles> total[2], span[2];
  int left[2];  // pages of the span
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    load_query(q[j], a, block.first + (local + j < block.n ? local + j : 0), heads);
    start_with_sinks(total[j], a.sinks, heads);
    reset(span[j]);
    left[j] = sight_of_row(j).span;
  }
  for (int page = first_page; page < end_page; ++page) {
    commit_copies();
    wait_copies<0>();
    __syncthreads();  // the page is there, and the one before it is done with
    if (page + 1 < end_page) start_page(page + 1, next);
    if (page + 2 < end_page) next = numbers[page + 2];
    Bounds bounds[2];
#pragma unroll
    for (int j = 0; j < 2; ++j)
      bounds[j] = bounds_of(sight_of_row(j).first_key, local + j < block.n ? sight_of_row(j).end_key : 0, page);
    if (!bounds[0].any() && !bounds[1].any()) continue;
    const uint8_t *keys = shared.keys[page % 2], *values = shared.values[page % 2];
    for (int half = 0; half < 2; ++half) {
      const int key = half * kHalf;
      if (bounds[0].whole(key, kHalf) && bounds[1].whole(key, kHalf))
        attend_two<AllSeen>(span, q, keys, values, half, {{}, {}});
      else if (bounds[0].sees(key, kHalf) || bounds[1].sees(key, kHalf))
        attend_two(span, q, keys, values, half, bounds);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const Sight sight = sight_of_row(j);
      if (!bounds[j].any() || (--left[j] > 0 && (page + 1) * kPage < sight.end_key)) continue;
      join(total[j], span[j]);
      reset(span[j]);
      left[j] = sight.span;
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j)
    if (local + j < block.n) finish(a, block.first + local + j, heads, total[j], 0);
}

// -------------------------------------------------------------------------------------------------------------- launches

int64_t passes_of(int64_t heads, int64_t kv_heads) { return ceil_div(heads / kv_heads, kHeads); }
int64_t parts_bytes(int64_t max_pages) { return std::min<int64_t>(max_pages, kMaxSpans) * static_cast<int64_t>(sizeof(Part)); }

// Blocks a unit: as many as fill the card about once, each with a page or more; and so many that a long row among many has
// no block of more than 32 pages. One where there is no work space for parts. A function of the launch's size alone.
int64_t count_slices(const AttentionArgs& a, int64_t n_units) {
  constexpr int64_t kBlocksPerMultiprocessor = 4;
  if (a.max_pages <= kWholePages || n_units > kMaxUnits) return 1;
  if (kCounterBytes + n_units * parts_bytes(a.max_pages) > a.workspace_bytes) return 1;
  const int64_t filling = kBlocksPerMultiprocessor * a.multiprocessors / n_units, least = ceil_div(a.max_pages, 32);
  return std::min({std::max(filling, least), a.max_pages, int64_t{kMaxSpans}});
}

template <class Shared>
Launch launch_of(int64_t x, int64_t y, int64_t z, int warps, cudaStream_t stream) {
  CHECK(y < 65536, "attention of ", x, " x ", y, " x ", z, " blocks is too large for one launch");
  return {dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)),
          dim3(static_cast<unsigned>(warps * kWarp)), sizeof(Shared), stream};
}

}  // namespace

int64_t attention_workspace_bytes(int64_t max_rows, int64_t heads, int64_t kv_heads, int64_t max_context) {
  // Whoever replays launches rounds their sizes up to powers of two.
  const auto rounded = [](int64_t n) { return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n))); };
  const int64_t per_unit = parts_bytes(rounded(ceil_div(max_context, kPage)));
  const int64_t units = rounded(max_rows) * kv_heads * passes_of(heads, kv_heads);
  return kCounterBytes + std::min(units, kMaxUnits) * per_unit;
}

void attention(const AttentionArgs& args, cudaStream_t stream) {
  const int group = static_cast<int>(args.heads / args.kv_heads);
  const int64_t passes = passes_of(args.heads, args.kv_heads), units = args.kv_heads * passes, rows = args.batch.n_single_rows;
  if (args.batch.n_row_blocks > 0)
    launch(launch_of<BlockShared>(units, args.batch.n_row_blocks, 1, kBlockWarps, stream), attention_blocks_kernel, args, group,
           static_cast<int>(passes));
  if (rows > 0)
    launch(launch_of<RowShared>(rows, units, count_slices(args, rows * units), kRowWarps, stream), attention_rows_kernel, args,
           group, static_cast<int>(passes), static_cast<int>(std::min<int64_t>(args.max_pages, kMaxSpans)));
}

}  // namespace gptoss::cuda
