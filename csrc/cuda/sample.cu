// One token from each row of logits, by the rules of sampling.h, in two launches:
//   summarize   a warp takes 256 neighbouring ids, a "group": adjusts the logits that a bias or a penalty changes (in
//               place, the original kept beside the adjustment), and leaves the largest logit and the sum of exponentials.
//               Here and below a logit that the row's mask forbids is read as minus infinity
//   choose      one block a row: the largest of all; where one is to be drawn, the filters and the draw; the originals put
//               back; log-probabilities. It reads only groups that can hold something it looks for
//
// A filter leaves a threshold: a logit, and the highest id that still counts among equals. The threshold of "the best elements
// whose weights first reach W" (weights 1: top_k; masses: top_p) is what select.cuh finds. It begins at a lower bound: the same
// threshold over the groups' largest logits alone. Groups below it are not read.
//
// Probabilities are relative to the largest and computed in float32; their sums are integers (masses), so that no order of
// adding matters. A draw, or an end of top_p, that lies within about 1e-6 of a boundary between two tokens may fall on its
// other side than the CPU's, which computes in double.
#include <algorithm>
#include <climits>
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/select.cuh"

namespace gptoss::cuda {
namespace {

constexpr int kGroup = 256;                                      // ids
constexpr int kPerLane = kGroup / kWarp;                         // of them
constexpr int kSummaryThreads = 256;                             // of a block of summarize
constexpr int kThreads = kSelectThreads, kWarps = kSelectWarps;  // of a block of choose
constexpr float kCertain = 0x1p42f;                              // the mass of probability 1. A mass below 1 is 0
constexpr int64_t kMaxVocab = 1 << 21;                           // whose masses can be added up

__host__ __device__ constexpr int64_t n_groups(int64_t vocab) { return ceil_div(vocab, kGroup); }

// What is known of the groups of one row.                                                                    each: [groups]
struct Groups {
  Mass* mass;         // of the chosen ones: work space of a draw
  float* best;        // the largest adjusted logit
  float* sum;         // of exp((adjusted logit - best) / temperature); not of greedy rows
  float* given_best;  // the same of the logits as they were given, at temperature 1; where log-probabilities are wanted
  float* given_sum;
  int32_t* id;      // the lowest with `best`
  int32_t* nans;    // how many
  int32_t* chosen;  // groups to look at, in order
};
constexpr int64_t kGroupBytes = sizeof(Mass) + 7 * 4;

__host__ __device__ constexpr int64_t row_bytes(int64_t vocab) { return round_up(n_groups(vocab) * kGroupBytes, 16); }

__device__ Groups groups_of(void* workspace, int64_t row, int vocab) {
  const int64_t n = n_groups(vocab);
  Groups g;
  g.mass = reinterpret_cast<Mass*>(static_cast<unsigned char*>(workspace) + row * row_bytes(vocab));
  g.best = reinterpret_cast<float*>(g.mass + n);
  g.sum = g.best + n;
  g.given_best = g.sum + n;
  g.given_sum = g.given_best + n;
  g.id = reinterpret_cast<int32_t*>(g.given_sum + n);
  g.nans = g.id + n;
  g.chosen = g.nans + n;
  return g;
}

__device__ const uint32_t* mask_of(const uint32_t* masks, const SampleParams& p, int vocab) {
  return p.mask < 0 ? nullptr : masks + p.mask * ceil_div(vocab, 32);
}

__device__ __forceinline__ float masked(const uint32_t* mask, int id, float logit) {
  return !mask || (mask[id / 32] >> id % 32 & 1) ? logit : -HUGE_VALF;
}

// ---------------------------------------------------------------------------------------------------------- summarize

// The group's largest logit, and the sum of exp((logit - best) * scale) if it is wanted. All lanes get both.
__device__ __forceinline__ void summarize_group(float& best, float& sum, const float (&logits)[kPerLane], float scale,
                                                bool wants_sum) {
  best = logits[0];
  for (int j = 1; j < kPerLane; ++j) best = fmaxf(best, logits[j]);
  for (int mask = kWarp / 2; mask > 0; mask /= 2) best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, mask));
  sum = 0;
  if (!wants_sum || best == -HUGE_VALF) return;
  for (int j = 0; j < kPerLane; ++j) sum += expf((logits[j] - best) * scale);
  sum = warp_sum(sum);
}

// A warp a group. Bytes: 4 a logit.
__global__ void __launch_bounds__(kSummaryThreads)
    summarize_kernel(void* workspace, float* logits, const SampleParams* params, StagedAdjustment* adjustments,
                     const uint32_t* masks, const int32_t* n_rows, int vocab) {
  let_next_start();
  wait_for_previous();
  const int64_t row = blockIdx.y;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int group = static_cast<int>(blockIdx.x) * (kSummaryThreads / kWarp) + static_cast<int>(threadIdx.x) / kWarp;
  if ((n_rows && row >= *n_rows) || group >= n_groups(vocab)) return;
  const SampleParams& p = params[row];
  const Groups groups = groups_of(workspace, row, vocab);
  float* x = logits + p.row * vocab;
  const int first = group * kGroup;
  float values[kPerLane];
  const auto read = [&](const uint32_t* mask) {
    for (int j = 0; j < kPerLane; ++j) {
      const int id = first + j * kWarp + lane;
      values[j] = id < vocab ? masked(mask, id, x[id]) : -HUGE_VALF;
    }
  };
  read(nullptr);
  int nans = 0;
  for (int j = 0; j < kPerLane; ++j) nans += __popc(__ballot_sync(kAllLanes, values[j] != values[j]));
  float best, sum;
  if (p.logprobs >= 0) {
    summarize_group(best, sum, values, 1.f, true);
    if (lane == 0) groups.given_best[group] = best, groups.given_sum[group] = sum;
  }
  if (p.n_adjustments > 0) {
    StagedAdjustment* list = adjustments + p.first_adjustment;
    int low = 0, high = p.n_adjustments;  // even lanes look for the group's first adjustment, odd ones for the next group's
    const int bound = first + lane % 2 * kGroup;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (list[middle].by.token < bound)
        low = middle + 1;
      else
        high = middle;
    }
    const int begin = __shfl_sync(kAllLanes, low, 0), end = __shfl_sync(kAllLanes, low, 1);
    for (int i = begin + lane; i < end; i += kWarp) {
      float& logit = x[list[i].by.token];
      list[i].logit = logit;
      logit = adjusted(logit, list[i].by, p.penalties);
    }
    __syncwarp();
  }
  if (p.n_adjustments > 0 || p.mask >= 0) read(mask_of(masks, p, vocab));
  summarize_group(best, sum, values, p.scale, !p.greedy);
  int id = first;
  for (int j = kPerLane - 1; j >= 0; --j)
    if (const unsigned votes = __ballot_sync(kAllLanes, values[j] == best)) id = first + j * kWarp + __ffs(votes) - 1;
  if (lane != 0) return;
  groups.best[group] = best;
  groups.sum[group] = sum;
  groups.id[group] = id;
  groups.nans[group] = nans;
}

// ------------------------------------------------------------------------------------------------------------- choose

struct Shared : SelectMemory {
  double sums[kWarps];
  int n_top;
  int32_t top_ids[kTopLogprobs];
  float top_logits[kTopLogprobs];
};

struct Row {
  const float* logits;  // [vocab]
  Groups groups;
  int vocab, n_groups;
  int n_chosen;
  float top, scale;
  const uint32_t* mask;  // [ceil(vocab / 32)] or null

  __device__ __forceinline__ float logit(int id) const { return masked(mask, id, logits[id]); }
  __device__ __forceinline__ Mass mass(float logit) const { return static_cast<Mass>(expf((logit - top) * scale) * kCertain); }
};

// What a filter leaves.
struct Threshold {
  uint32_t key = 0;
  int32_t id = INT_MAX;

  __device__ __forceinline__ bool keeps(int id_, float logit) const {
    const uint32_t k = key_of(logit);
    return k > key || (k == key && id_ <= id);
  }
};

// Groups that hold a logit of this key or more.
__device__ void choose_groups(Row& row, const float* best, uint32_t key, Shared& shared) {
  int n = 0;
  for (int first = 0; first < row.n_groups; first += kThreads) {
    const int group = first + static_cast<int>(threadIdx.x);
    const bool wanted = group < row.n_groups && key_of(best[group]) >= key;
    Mass total;
    const int place = n + static_cast<int>(block_scan(total, wanted, shared));
    if (wanted) row.groups.chosen[place - 1] = group;
    n += static_cast<int>(total);
  }
  row.n_chosen = n;
  __syncthreads();
}

// Calls visit(id, logit) for each element of one of the chosen groups; a warp's work.
template <class Visit>
__device__ __forceinline__ void each_element(const Row& row, int chosen, const Visit& visit) {
  const int first = row.groups.chosen[chosen] * kGroup + static_cast<int>(threadIdx.x) % kWarp;
  float values[kPerLane];
  for (int j = 0; j < kPerLane; ++j) values[j] = first + j * kWarp < row.vocab ? row.logit(first + j * kWarp) : -HUGE_VALF;
  for (int j = 0; j < kPerLane; ++j)
    if (first + j * kWarp < row.vocab) visit(first + j * kWarp, values[j]);
}

// The weight of all elements of the chosen groups; leaves that of each group for pick().
template <class Weight>
__device__ Mass weigh(const Row& row, Shared& shared, const Weight& weight) {
  Mass all = 0;
  for (int i = static_cast<int>(threadIdx.x) / kWarp; i < row.n_chosen; i += kWarps) {
    Mass sum = 0;
    each_element(row, i, [&](int id, float logit) { sum += weight(id, logit); });
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
    if (threadIdx.x % kWarp != 0) continue;
    row.groups.mass[i] = sum;
    all += sum;
  }
  return block_sum(all, shared);
}

// The id at which the weights, added up by id, first exceed `target`. Where a group's weight was rounded otherwise than those
// of its elements, the group's best.
template <class Weight>
__device__ int pick(const Row& row, Mass target, Shared& shared, const Weight& weight) {
  const int i = find(target, row.n_chosen, shared, [&](int place) { return row.groups.mass[place]; });
  const int group = row.groups.chosen[i], first = group * kGroup;
  const int n = row.vocab - first < kGroup ? row.vocab - first : kGroup;
  const int found = find(target, n, shared, [&](int place) { return weight(first + place, row.logit(first + place)); });
  return found < 0 ? row.groups.id[group] : first + found;
}

__device__ __forceinline__ Mass one(float) { return 1; }

// A key that at least `target` + 1 of weight reaches, by the groups' largest logits alone; 0 if they do not tell.
template <class Weight>
__device__ uint32_t lower_bound(const Row& row, const float* best, Mass target, Shared& shared, const Weight& weight) {
  const auto each = [&](const auto& visit) {
    for (int i = static_cast<int>(threadIdx.x); i < row.n_groups; i += kThreads) visit(best[i]);
  };
  return select(target, 0, key_of(row.top), shared, each, weight).key;
}

// Narrows the threshold to the best of the elements it keeps whose weights first exceed `target`: all, if they never do.
template <class Weight>
__device__ void narrow(Threshold& threshold, const Row& row, Mass target, uint32_t low, Shared& shared, const Weight& weight) {
  const auto each = [&](const auto& visit) {
    for (int i = static_cast<int>(threadIdx.x) / kWarp; i < row.n_chosen; i += kWarps)
      each_element(row, i, [&](int id, float logit) {
        if (threshold.keeps(id, logit)) visit(logit);
      });
  };
  const Selected s = select(target, low, key_of(row.top), shared, each, weight);
  if (!s.found) return;
  int32_t id = s.key == threshold.key ? threshold.id : INT_MAX;
  const Mass last = s.count > 1 ? s.rest / weight(logit_of(s.key)) : 0;  // of the equals, the last that is needed
  if (last + 1 < s.count) {
    const auto is_equal = [&](int, float logit) { return Mass{key_of(logit) == s.key}; };
    weigh(row, shared, is_equal);
    id = pick(row, last, shared, is_equal);
  }
  threshold = {s.key, id};
}

// The last weight that is not enough to be top_p of the total.
__device__ __forceinline__ Mass nucleus(double top_p, Mass total) {
  const double enough = ceil(top_p * static_cast<double>(total));
  return enough > 1 ? static_cast<Mass>(enough) - 1 : 0;
}

__device__ int draw(Row& row, const SampleParams& p, Shared& shared) {
  const Groups& g = row.groups;
  const auto mass = [&](float logit) { return row.mass(logit); };
  const auto group_mass = [&](int i) {
    return static_cast<Mass>(g.sum[i] * expf((g.best[i] - row.top) * row.scale) * kCertain);
  };
  Threshold threshold;
  if (p.top_k > 0) {
    const uint32_t low = lower_bound(row, g.best, p.top_k - 1, shared, one);
    choose_groups(row, g.best, low, shared);
    narrow(threshold, row, p.top_k - 1, low, shared, one);
  }
  const auto kept = [&](int id, float logit) { return threshold.keeps(id, logit) ? row.mass(logit) : 0; };
  if (p.top_p < 1 && p.top_k > 0) {
    narrow(threshold, row, nucleus(p.top_p, weigh(row, shared, kept)), threshold.key, shared, mass);
  } else if (p.top_p < 1) {
    Mass total = 0;
    for (int i = static_cast<int>(threadIdx.x); i < row.n_groups; i += kThreads) total += group_mass(i);
    const Mass target = nucleus(p.top_p, block_sum(total, shared));
    const uint32_t low = lower_bound(row, g.best, target, shared, mass);
    choose_groups(row, g.best, low, shared);
    narrow(threshold, row, target, low, shared, mass);
  }
  if (p.min_gap > -HUGE_VAL) {
    const double least = row.top + p.min_gap;
    float logit = static_cast<float>(least);
    if (logit < least) logit = nextafterf(logit, HUGE_VALF);
    if (const uint32_t key = key_of(logit); key > threshold.key) threshold = {key, INT_MAX};
  }
  choose_groups(row, g.best, threshold.key, shared);
  Mass total = 0;
  if (threshold.key > 0) {
    total = weigh(row, shared, kept);
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < row.n_groups; i += kThreads) total += g.mass[i] = group_mass(i);
    total = block_sum(total, shared);
  }
  const Mass target = static_cast<Mass>(p.uniform * static_cast<double>(total));
  return pick(row, target < total ? target : total - 1, shared, kept);
}

// log(sum(exp(logits))) and the most probable, of the logits as they were given.
__device__ void add_logprobs(SampleResult& result, Row& row, int n_top, Shared& shared) {
  const Groups& g = row.groups;
  float top = -HUGE_VALF;
  for (int i = static_cast<int>(threadIdx.x); i < row.n_groups; i += kThreads) top = fmaxf(top, g.given_best[i]);
  row.top = logit_of(
      static_cast<uint32_t>(block_reduce(Mass{key_of(top)}, shared.parts, [](Mass a, Mass b) { return a > b ? a : b; })));
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < row.n_groups; i += kThreads)
    sum += g.given_sum[i] * exp(static_cast<double>(g.given_best[i]) - row.top);
  sum = block_reduce(sum, shared.sums, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) result.log_sum = row.top + log(sum);
  if (n_top == 0) return;

  Threshold threshold;
  const uint32_t low = lower_bound(row, g.given_best, n_top - 1, shared, one);
  choose_groups(row, g.given_best, low, shared);
  narrow(threshold, row, n_top - 1, low, shared, one);
  if (threadIdx.x == 0) shared.n_top = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x) / kWarp; i < row.n_chosen; i += kWarps)
    each_element(row, i, [&](int id, float logit) {
      if (!threshold.keeps(id, logit)) return;
      const int place = atomicAdd(&shared.n_top, 1);
      shared.top_ids[place] = id;
      shared.top_logits[place] = logit;
    });
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x);
  if (i >= n_top) return;
  const int32_t id = shared.top_ids[i];
  const float logit = shared.top_logits[i];
  int rank = 0;
  for (int j = 0; j < n_top; ++j)
    rank += shared.top_logits[j] > logit || (shared.top_logits[j] == logit && shared.top_ids[j] < id);
  result.top_ids[rank] = id;
  result.top_logits[rank] = logit;
}

// A block a row. Bytes: 16 a group; and of the rows that draw, groups that may be drawn from, some times each.
__global__ void __launch_bounds__(kThreads)
    choose_kernel(SampleResult* results, void* workspace, float* logits, const SampleParams* params,
                  const StagedAdjustment* adjustments, const uint32_t* masks, const int32_t* n_rows, int vocab) {
  let_next_start();
  wait_for_previous();
  if (n_rows && static_cast<int>(blockIdx.x) >= *n_rows) return;
  Shared& shared = *shared_memory<Shared>();
  const SampleParams& p = params[blockIdx.x];
  SampleResult& result = results[blockIdx.x];
  float* x = logits + p.row * vocab;
  Row row{x,       groups_of(workspace, blockIdx.x, vocab),
          vocab,   static_cast<int>(n_groups(vocab)),
          0,       0,
          p.scale, mask_of(masks, p, vocab)};

  Mass nans = 0, best = 0;  // best: key, then the complement of the id
  for (int i = static_cast<int>(threadIdx.x); i < row.n_groups; i += kThreads) {
    nans += row.groups.nans[i];
    const Mass candidate = Mass{key_of(row.groups.best[i])} << 32 | static_cast<uint32_t>(~row.groups.id[i]);
    best = candidate > best ? candidate : best;
  }
  nans = block_sum(nans, shared);
  best = block_reduce(best, shared.parts, [](Mass a, Mass b) { return a > b ? a : b; });
  row.top = logit_of(static_cast<uint32_t>(best >> 32));
  const bool possible = nans == 0 && fabsf(row.top) < HUGE_VALF;
  int token = static_cast<int>(~static_cast<uint32_t>(best));
  if (possible && !p.greedy) token = draw(row, p, shared);
  if (p.n_adjustments > 0) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < p.n_adjustments; i += kThreads) {
      const StagedAdjustment& a = adjustments[p.first_adjustment + i];
      x[a.by.token] = a.logit;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    result.token = possible ? token : -1;
    result.n_nans = static_cast<int32_t>(nans);
    result.top = row.top;
    if (possible) result.logit = x[token];
  }
  row.mask = nullptr;
  if (possible && p.logprobs >= 0) add_logprobs(result, row, p.logprobs, shared);
}

}  // namespace

// --------------------------------------------------------------------------------------------------------------- host

SampleParams stage_sample(std::vector<StagedAdjustment>& adjustments, std::vector<const uint32_t*>& masks,
                          const Sampler& sampler, int64_t row, int64_t position) {
  const SamplingOptions& o = sampler.options();
  SampleParams p;
  p.row = row;
  p.greedy = o.temperature == 0 || o.top_k == 1;
  // Never 0 or infinite: a difference of 0 and one of infinity stay what they are.
  p.scale = p.greedy ? 1.f : static_cast<float>(std::min(std::max(1 / o.temperature, 1e-37), 1e38));
  p.top_k = o.top_k < sampler.vocab_size() ? static_cast<int32_t>(o.top_k) : 0;
  p.top_p = o.top_p;
  p.min_gap = o.min_p > 0 ? o.temperature * std::log(o.min_p) : -HUGE_VAL;
  p.uniform = uniform(o.seed, static_cast<uint64_t>(position));
  p.penalties = sampler.penalties();
  p.logprobs = static_cast<int32_t>(std::min<int64_t>(o.logprobs, kTopLogprobs));
  p.first_adjustment = static_cast<int32_t>(adjustments.size());
  p.n_adjustments = static_cast<int32_t>(sampler.adjustments().size());
  for (const TokenAdjustment& by : sampler.adjustments()) adjustments.push_back({by, 0});
  if (sampler.mask().empty()) return p;
  p.mask = static_cast<int32_t>(masks.size());
  masks.push_back(sampler.mask().data());
  return p;
}

Sample finish_sample(const SampleResult& result, const Sampler& sampler) {
  if (result.n_nans > 0) fail_not_numbers(result.n_nans);
  if (result.token < 0) fail_no_maximum(result.top);
  Sample sample;
  sample.token = result.token;
  const int64_t n_top = sampler.options().logprobs;
  if (n_top >= 0) sample.logprob = result.logit - result.log_sum;
  for (int64_t i = 0; i < n_top; ++i) sample.top.emplace_back(result.top_ids[i], result.top_logits[i] - result.log_sum);
  return sample;
}

int64_t sample_workspace_bytes(int64_t n, int64_t vocab) { return n * row_bytes(vocab); }

void sample(SampleResult* results, float* logits, const SampleParams* params, StagedAdjustment* adjustments,
            const uint32_t* masks, void* workspace, const int32_t* n_rows, int64_t n, int64_t vocab, cudaStream_t stream) {
  CHECK(vocab <= kMaxVocab, "sampling on the card takes a vocabulary of at most ", kMaxVocab, ", not ", vocab);
  CHECK(n < 65536, "sampling on the card takes at most 65535 rows at a time, not ", n);
  const unsigned blocks = static_cast<unsigned>(ceil_div(n_groups(vocab), kSummaryThreads / kWarp));
  launch({dim3(blocks, static_cast<unsigned>(n)), dim3(kSummaryThreads), 0, stream}, summarize_kernel, workspace, logits,
         params, adjustments, masks, n_rows, static_cast<int>(vocab));
  launch({dim3(static_cast<unsigned>(n)), dim3(kThreads), sizeof(Shared), stream}, choose_kernel, results, workspace, logits,
         params, static_cast<const StagedAdjustment*>(adjustments), masks, n_rows, static_cast<int>(vocab));
}

}  // namespace gptoss::cuda
