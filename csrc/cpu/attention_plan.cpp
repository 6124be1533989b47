#include "cpu/attention_plan.h"

#include <algorithm>

#include "cpu/kernel_table.h"

namespace gptoss::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

int64_t AttentionPlan::most_states(int64_t max_rows, int64_t context, int64_t kv_heads, int64_t threads) {
  if (threads == 1) return 0;
  return std::min(max_rows, (threads * kPartsPerThread - 1) / kv_heads) * ceil_div(context, kChunkKeys);
}

void AttentionPlan::reserve(int64_t max_rows) {
  rows_.reserve(max_rows);
  cut_rows_.reserve(max_rows);
}

void AttentionPlan::make(const int32_t* positions, int64_t n_rows, int64_t window, int64_t kv_heads, int64_t threads) {
  rows_.clear();
  cut_rows_.clear();
  n_units_ = n_states_ = 0;
  int64_t all = 0;
  for (int64_t i = 0; i < n_rows; ++i) {
    AttentionRow row;
    row.end_key = positions[i] + 1;
    row.first_key = window ? std::max<int64_t>(0, row.end_key - window) : 0;
    row.first_chunk = row.first_key / kChunkKeys;
    row.n_chunks = ceil_div(row.end_key, kChunkKeys) - row.first_chunk;
    all += row.n_chunks * kv_heads;
    rows_.push_back(row);
  }
  const int64_t most = std::max(kMostChunks, ceil_div(all, threads * kPartsPerThread));
  for (int64_t i = 0; i < n_rows; ++i) {
    AttentionRow& row = rows_[i];
    row.parts = threads == 1 ? 1 : ceil_div(row.n_chunks, most);
    row.first_unit = n_units_;
    n_units_ += row.parts * kv_heads;
    if (row.parts == 1) continue;
    cut_rows_.push_back(static_cast<int32_t>(i));
    row.first_state = n_states_;
    n_states_ += row.n_chunks;
  }
}

AttentionUnit AttentionPlan::unit(int64_t i) const {
  const auto after = std::upper_bound(rows_.begin(), rows_.end(), i,
                                      [](int64_t unit, const AttentionRow& row) { return unit < row.first_unit; });
  const AttentionRow& row = *std::prev(after);
  const int64_t rest = i - row.first_unit;
  return {std::prev(after) - rows_.begin(), rest / row.parts, rest % row.parts};
}

}  // namespace gptoss::cpu
