// The operations on the CPU: who does which rows. The arithmetic is in kernels/, once for each instruction set.
//
// Products are divided by output rows, never by inputs, and every output of a token is the work of one kernel call: so no
// result depends on the number of threads or on the other tokens. Rows that several experts add to take the experts in order
// of their ids. Attention over many keys may be the work of several calls (attention_plan.h); one joins what they leave, in a
// fixed order.
#include "backend.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>

#include "cpu/attention_plan.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/threads.h"

namespace gptoss::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const BackendOptions& options)
      : kernels_(select_kernels(options.isa)),
        pool_(options.threads > 0 ? options.threads : default_threads()),
        max_tokens_(options.max_batch_tokens),
        fast_(options.precision == Precision::kFast),
        tiles_(fast_ ? kernels_.int8_tiles : kernels_.tiles) {}

  std::string device() const override { return "cpu"; }
  std::string isa() const override { return kernels_.name; }
  int threads() const override { return pool_.size(); }

  Buffer allocate(size_t bytes) override { return allocate_pages(bytes); }
  void copy_in(void* device, const void* host, size_t bytes) override { std::memcpy(device, host, bytes); }
  void copy_out(void* host, const void* device, size_t bytes) override { std::memcpy(host, device, bytes); }
  size_t available_memory() const override {
    constexpr size_t kSpare = 512 << 20;
    const size_t available = cpu::available_memory();
    return available > kSpare ? available - kSpare : 0;
  }
  void synchronize() override {}

  void reserve(const ModelConfig& config, const Limits& limits) override {
    const int64_t slots = max_tokens_ * config.experts_per_token;
    const int64_t most_panels = ceil_div(std::max(config.hidden_size, 2 * config.intermediate_size), kPanelRows);
    packed_ = allocate_pages(packed_bytes(config));
    packed_hidden_ = allocate_pages(packed_hidden_bytes(config));
    if (fast_) hidden_ = allocate_pages(hidden_bytes(config));
    states_ = allocate_pages(states_bytes(config, limits));
    attention_plan_.reserve(max_tokens_);
    groups_.reserve(config.n_experts);
    expert_next_.resize(config.n_experts);
    experts_added_ = std::make_unique<std::atomic<int64_t>[]>(most_panels);
    slot_tokens_.resize(slots);
    slot_weights_.resize(slots);
    router_logits_.resize(pool_.size() * config.n_experts);
  }

  size_t workspace_bytes(const ModelConfig& config, const Limits& limits) override {
    return packed_bytes(config) + packed_hidden_bytes(config) + hidden_bytes(config) + states_bytes(config, limits);
  }

  size_t weight_bytes(WeightFormat format, int64_t experts, int64_t rows, int64_t cols) const override;
  Weight make_weight(WeightFormat format, int64_t experts, int64_t rows, int64_t cols, RowOrder order) override;
  void load_rows(Weight& weight, int64_t first_row, const HostTensor& source) override;
  void load_mxfp4_blocks(Weight& weight, const HostTensor& blocks) override;
  void load_mxfp4_scales(Weight& weight, const HostTensor& scales) override;
  void finish_loading() override {}

  void begin(const Batch& batch) override {
    CHECK(batch.n_tokens() <= max_tokens_, "a step takes at most ", max_tokens_, " tokens, not ", batch.n_tokens());
    batch_ = &batch;
  }

  void embed(Mat<float> x, const Weight& table) override {
    const uint16_t* rows = table.storage.as<uint16_t>();
    pool_.run(x.rows, [&](int64_t i, int) { kernels_.embed(x.row(i), rows + batch_->tokens[i] * x.cols, x.cols); });
  }

  void rmsnorm(Mat<float> t, Mat<const float> x, const float* weight, float eps, const int32_t* rows) override {
    pool_.run(t.rows, [&](int64_t i, int) { kernels_.rmsnorm(t.row(i), x.row(rows ? rows[i] : i), weight, eps, t.cols); });
  }

  void linear(Mat<float> out, Mat<const float> t, const Weight& weight, const float* bias) override {
    product(out, t, weight, bias, Epilogue::kStore);
  }
  void linear_add(Mat<float> x, Mat<const float> a, const Weight& weight, const float* bias) override {
    product(x, a, weight, bias, Epilogue::kAdd);
  }

  void rope_append(Mat<float> q, const KvLayer& cache, Mat<const float> qkv, const RopeTable& rope, int64_t kv_heads) override;
  void attention(Mat<float> out, Mat<const float> q, const KvLayer& cache, const float* sinks, int64_t kv_heads) override;
  void route(Routing top, Mat<const float> t, const Weight& weight, const float* bias) override;
  void moe_add(Mat<float> x, Mat<const float> t, const Routing& top, const ExpertWeights& experts) override;

 private:
  // The tokens of one expert in this step: slots [first, first + n) of slot_tokens_ and slot_weights_.
  struct Group {
    int64_t expert, first, n;
  };

  // How weights of a format are kept.
  WeightFormat held(WeightFormat format) const { return fast_ && format == WeightFormat::kBf16 ? WeightFormat::kInt8 : format; }
  size_t packed_bytes(const ModelConfig& config) const {
    const int64_t widest = std::max(config.hidden_size, config.q_size());
    return max_tokens_ * std::max(token_bytes(widest, false), config.experts_per_token * token_bytes(config.hidden_size, true));
  }
  size_t packed_hidden_bytes(const ModelConfig& config) const {
    return max_tokens_ * config.experts_per_token * token_bytes(config.intermediate_size, true);
  }
  size_t hidden_bytes(const ModelConfig& config) const {
    return fast_ ? max_tokens_ * config.experts_per_token * config.intermediate_size * sizeof(float) : 0;
  }

  size_t states_bytes(const ModelConfig& config, const Limits& limits) const {
    const int64_t chunks = AttentionPlan::most_states(max_tokens_, limits.context, config.n_kv_heads, pool_.size());
    return chunks * config.n_heads * kStateFloats * sizeof(float);
  }

  void product(Mat<float> out, Mat<const float> t, const Weight& weight, const float* bias, Epilogue epilogue);
  void group_by_expert(const Routing& top, int64_t n_experts);
  // Tokens of every expert as tiles: rows slot_tokens_ of t, or where `by_slot` row i of t is slot i.
  void pack_groups(const Buffer& packed, Mat<const float> t, bool by_slot);
  template <class Finish>
  void expert_products(const Weight& weight, const Buffer& packed, int64_t n_tokens, const Finish& finish);
  void swiglu_products(const ExpertWeights& experts, int64_t n_tokens);
  void down_products(Mat<float> x, const ExpertWeights& experts);

  int64_t token_bytes(int64_t cols, bool mxfp4) const {
    return fast_ ? int8_token_bytes(cols, mxfp4) : cols * kernels_.packed_bytes;
  }
  void pack_tile(uint8_t* tile, Mat<const float> t, const int32_t* rows, int64_t n, bool mxfp4) const {
    if (fast_)
      kernels_.pack_tokens_int8(tile, t.data, t.cols, rows, n, t.cols, mxfp4);
    else
      kernels_.pack_tokens(tile, t.data, t.cols, rows, n, t.cols);
  }
  void multiply(const MatmulArgs& args) const { fast_ ? kernels_.matmul_int8(args) : kernels_.matmul(args); }

  // Units of work that a product's panels are cut into, as alike in size as can be (tile_start): a few a thread, so that a slow
  // core takes fewer, each a long stream; for many tokens, of at most `most` panels.
  int64_t n_units(int64_t n_panels, int64_t n_tokens, int64_t most) const {
    const int64_t few = pool_.size() * 4;
    return std::min(n_panels, n_tokens > tiles_.alone ? round_up(ceil_div(n_panels, most), few) : few);
  }
  const PageList& pages_of(int64_t row, const KvLayer& cache) const {
    const BatchSequence& sequence = batch_->sequences[batch_->sequence_of[row]];
    return cache.window ? *sequence.window_pages : *sequence.full_pages;
  }

  const KernelTable& kernels_;
  ThreadPool pool_;
  int64_t max_tokens_;
  bool fast_;  // products of bytes
  TileSizes tiles_;
  const Batch* batch_ = nullptr;
  Buffer packed_;         // token tiles of the product at hand
  Buffer packed_hidden_;  // token tiles between gate_up and down
  Buffer hidden_;         // fast: [n * k, I] what those are made of
  Buffer states_;         // of rows that attention cuts: [rows][heads / group][chunks of the row][group * kStateFloats]
  AttentionPlan attention_plan_;
  std::vector<Group> groups_;
  std::unique_ptr<std::atomic<int64_t>[]> experts_added_;  // [panels of an output] experts that have added to them
  std::vector<int64_t> expert_next_;                       // [E] where an expert's next slot is
  std::vector<int32_t> slot_tokens_;                       // [n * k] rows of the batch, by expert
  std::vector<float> slot_weights_;                        // [n * k]
  std::vector<float> router_logits_;                       // [threads, E]
};

// ------------------------------------------------------------------------------------------------------------ weights

int64_t panel_bytes(WeightFormat format, int64_t cols) {
  switch (format) {
    case WeightFormat::kMxfp4:
      return mxfp4_panel_bytes(cols);
    case WeightFormat::kInt8:
      return int8_panel_bytes(cols);
    default:
      return bf16_panel_bytes(cols);
  }
}
int64_t panel_bytes(const Weight& weight) { return panel_bytes(weight.format, weight.cols); }

size_t CpuBackend::weight_bytes(WeightFormat format, int64_t experts, int64_t rows, int64_t cols) const {
  if (format == WeightFormat::kTable) return rows * cols * 2;
  return experts * ceil_div(rows, kPanelRows) * panel_bytes(held(format), cols);
}

Weight CpuBackend::make_weight(WeightFormat format, int64_t experts, int64_t rows, int64_t cols, RowOrder order) {
  Weight weight{held(format), experts, rows, cols, order, {}};
  weight.storage = allocate_pages(weight_bytes(format, experts, rows, cols));
  return weight;
}

void CpuBackend::load_rows(Weight& weight, int64_t first_row, const HostTensor& source) {
  const uint16_t* rows = static_cast<const uint16_t*>(source.data);
  const int64_t n = source.shape[0], cols = weight.cols;
  if (weight.format == WeightFormat::kTable) {
    constexpr int64_t kRows = 256;
    uint16_t* table = weight.storage.as<uint16_t>() + first_row * cols;
    pool_.run(ceil_div(n, kRows), [&](int64_t unit, int) {
      const int64_t row = unit * kRows;
      std::memcpy(table + row * cols, rows + row * cols, std::min(kRows, n - row) * cols * 2);
    });
    return;
  }
  CHECK(first_row % kPanelRows == 0, source.name, ": its rows start at ", first_row, ", inside a panel");
  uint8_t* panels = weight.storage.as<uint8_t>() + first_row / kPanelRows * panel_bytes(weight);
  pool_.run(ceil_div(n, kPanelRows), [&](int64_t p, int) {
    const int64_t row = p * kPanelRows, n_rows = std::min(kPanelRows, n - row);
    uint8_t* panel = panels + p * panel_bytes(weight);
    if (weight.format == WeightFormat::kInt8)
      kernels_.pack_int8_panel(panel, rows + row * cols, n_rows, cols);
    else
      kernels_.pack_bf16_panel(panel, rows + row * cols, n_rows, cols, weight.order == RowOrder::kGateUp);
  });
}

// Runs pack(panel, first source row, rows) over all panels of all experts.
template <class Pack>
void pack_experts(ThreadPool& pool, const Weight& weight, const Pack& pack) {
  const int64_t panels = ceil_div(weight.rows, kPanelRows);
  pool.run(weight.experts * panels, [&](int64_t unit, int) {
    const int64_t expert = unit / panels, row = unit % panels * kPanelRows;
    pack(weight.storage.as<uint8_t>() + unit * panel_bytes(weight), expert * weight.rows + row,
         std::min(kPanelRows, weight.rows - row));
  });
}

void CpuBackend::load_mxfp4_blocks(Weight& weight, const HostTensor& blocks) {
  const uint8_t* source = static_cast<const uint8_t*>(blocks.data);
  pack_experts(pool_, weight, [&](uint8_t* panel, int64_t row, int64_t n) {
    kernels_.pack_mxfp4_blocks(panel, source + row * weight.cols / 2, n, weight.cols, weight.order == RowOrder::kGateUp);
  });
}

void CpuBackend::load_mxfp4_scales(Weight& weight, const HostTensor& scales) {
  const uint8_t* source = static_cast<const uint8_t*>(scales.data);
  if (fast_) {
    const auto [least, most] = std::minmax_element(source, source + weight.experts * weight.rows * weight.cols / 32);
    CHECK(*least >= kLeastInt8Scale && *most <= kMostInt8Scale, scales.name, ": scale bytes from ", int{*least}, " to ",
          int{*most}, " are more than precision \"fast\" can take, ", int{kLeastInt8Scale}, " to ", int{kMostInt8Scale},
          "; use \"exact\"");
  }
  pack_experts(pool_, weight, [&](uint8_t* panel, int64_t row, int64_t n) {
    kernels_.pack_mxfp4_scales(panel, source + row * weight.cols / 32, n, weight.cols, weight.order == RowOrder::kGateUp);
  });
}

// ----------------------------------------------------------------------------------------------------------- products

void CpuBackend::product(Mat<float> out, Mat<const float> t, const Weight& weight, const float* bias, Epilogue epilogue) {
  const int64_t n = t.rows, tiles = n_tiles(n, tiles_);
  const bool mxfp4 = weight.format == WeightFormat::kMxfp4;
  pool_.run(tiles, [&](int64_t i, int) {
    const int64_t first = tile_start(n, tiles, i), count = tile_start(n, tiles, i + 1) - first;
    pack_tile(packed_.as<uint8_t>() + first * token_bytes(t.cols, mxfp4), {t.row(first), count, t.cols}, nullptr, count, mxfp4);
  });
  MatmulArgs args;
  args.panels = weight.storage.as<uint8_t>();
  args.mxfp4 = mxfp4;
  args.rows = weight.rows;
  args.cols = weight.cols;
  args.packed = packed_.data();
  args.n_tokens = n;
  args.bias = bias;
  args.epilogue = epilogue;
  args.out = out.data;
  args.out_stride = out.cols;
  const int64_t panels = ceil_div(weight.rows, kPanelRows), units = n_units(panels, n, 8);
  pool_.run(units, [&](int64_t unit, int) {
    MatmulArgs mine = args;
    mine.first_panel = tile_start(panels, units, unit);
    mine.n_panels = tile_start(panels, units, unit + 1) - mine.first_panel;
    if (const int64_t likely = unit + pool_.size(); likely < units)
      mine.next = args.panels + tile_start(panels, units, likely) * panel_bytes(weight);
    multiply(mine);
  });
}

// ---------------------------------------------------------------------------------------------------------- attention

void CpuBackend::rope_append(Mat<float> q, const KvLayer& cache, Mat<const float> qkv, const RopeTable& rope,
                             int64_t kv_heads) {
  const int64_t heads = q.cols / kHeadDim, bytes = page_bytes(kv_heads), head_bytes = kPageTokens * kHeadDim * 2;
  pool_.run(qkv.rows, [&](int64_t i, int) {
    const int64_t position = batch_->positions[i], slot = position % kPageTokens;
    const int64_t page = pages_of(i, cache).page_of(position);
    const float *cos = rope.cos.row(position), *sin = rope.sin.row(position), *in = qkv.row(i);
    for (int64_t h = 0; h < heads; ++h) kernels_.rope(q.row(i) + h * kHeadDim, in + h * kHeadDim, cos, sin);
    for (int64_t h = 0; h < kv_heads; ++h) {
      float key[kHeadDim];
      kernels_.rope(key, in + (heads + h) * kHeadDim, cos, sin);
      const int64_t offset = page * bytes + h * head_bytes;
      kernels_.append(reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(cache.keys) + offset),
                      reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(cache.values) + offset), slot, key,
                      in + (heads + kv_heads + h) * kHeadDim);
    }
  });
}

void CpuBackend::attention(Mat<float> out, Mat<const float> q, const KvLayer& cache, const float* sinks, int64_t kv_heads) {
  const int64_t heads = q.cols / kHeadDim, group = heads / kv_heads, head_bytes = kPageTokens * kHeadDim * 2;
  const AttentionPlan& plan = attention_plan_;
  attention_plan_.make(batch_->positions.data(), q.rows, cache.window, kv_heads, pool_.size());
  const size_t bytes = plan.n_states() * heads * kStateFloats * sizeof(float);
  if (bytes > states_.bytes())
    FAIL("attention needs ", bytes, " bytes of work space where ", states_.bytes(), " were reserved");

  // Calls the kernel for kMaxGroup query heads at a time, with the keys of chunks [begin, end) of row i.
  const auto each_group = [&](int64_t i, int64_t kv_head, int64_t begin, int64_t end, const auto& kernel) {
    const AttentionRow& row = plan.rows()[i];
    const PageList& pages = pages_of(i, cache);
    AttentionArgs args;
    args.keys = static_cast<const uint8_t*>(cache.keys) + kv_head * head_bytes;
    args.values = static_cast<const uint8_t*>(cache.values) + kv_head * head_bytes;
    args.page_bytes = page_bytes(kv_heads);
    args.pages = pages.pages.data();
    args.first_page = pages.first_page;
    args.first_key = std::max(row.first_key, (row.first_chunk + begin) * kChunkKeys);
    args.end_key = std::min(row.end_key, (row.first_chunk + end) * kChunkKeys);
    for (int64_t first = 0; first < group; first += kMaxGroup) {
      const int64_t head = kv_head * group + first;
      args.group = std::min(kMaxGroup, group - first);
      args.q = q.row(i) + head * kHeadDim;
      args.out = out.row(i) + head * kHeadDim;
      args.sinks = sinks + head;
      args.states = states_.as<float>() + (row.first_state * heads + row.n_chunks * head + begin * args.group) * kStateFloats;
      kernel(args);
    }
  };
  pool_.run(plan.n_units(), [&](int64_t i, int) {
    const AttentionUnit unit = plan.unit(i);
    const AttentionRow& row = plan.rows()[unit.row];
    each_group(unit.row, unit.kv_head, tile_start(row.n_chunks, row.parts, unit.part),
               tile_start(row.n_chunks, row.parts, unit.part + 1),
               row.parts == 1 ? kernels_.attention : kernels_.attention_states);
  });
  pool_.run(std::ssize(plan.cut_rows()) * kv_heads, [&](int64_t i, int) {
    const int64_t row = plan.cut_rows()[i / kv_heads];
    each_group(row, i % kv_heads, 0, plan.rows()[row].n_chunks, kernels_.attention_join);
  });
}

// ------------------------------------------------------------------------------------------------- mixture of experts

void CpuBackend::route(Routing top, Mat<const float> t, const Weight& weight, const float* bias) {
  const int64_t n_experts = weight.rows, k = top.experts.cols;
  pool_.run(t.rows, [&](int64_t i, int thread) {
    float* logits = router_logits_.data() + thread * n_experts;
    kernels_.router(logits, t.row(i), weight.storage.as<uint16_t>(), bias, n_experts, t.cols);
    int32_t* ids = top.experts.row(i);
    float* weights = top.weights.row(i);
    for (int64_t j = 0; j < k; ++j) {  // insertion: the first of equals stays first
      ids[j] = -1;
      weights[j] = 0;
    }
    for (int64_t e = 0; e < n_experts; ++e) {
      int64_t j = k;
      while (j > 0 && (ids[j - 1] < 0 || logits[e] > weights[j - 1])) --j;
      if (j == k) continue;
      for (int64_t m = k - 1; m > j; --m) ids[m] = ids[m - 1], weights[m] = weights[m - 1];
      ids[j] = static_cast<int32_t>(e);
      weights[j] = logits[e];
    }
    const float largest = weights[0];
    float sum = 0;
    for (int64_t j = 0; j < k; ++j) sum += weights[j] = std::exp(weights[j] - largest);
    for (int64_t j = 0; j < k; ++j) weights[j] /= sum;
  });
}

// Sorts (token, choice) pairs by expert, tokens in order: a histogram, its prefix sum, one pass.
void CpuBackend::group_by_expert(const Routing& top, int64_t n_experts) {
  const int64_t slots = top.experts.size(), k = top.experts.cols;
  std::vector<int64_t>& next = expert_next_;
  next.assign(n_experts, 0);
  for (int64_t i = 0; i < slots; ++i) ++next[top.experts.data[i]];
  groups_.clear();
  int64_t first = 0;
  for (int64_t e = 0; e < n_experts; ++e) {
    const int64_t n = next[e];
    if (n > 0) groups_.push_back({e, first, n});
    next[e] = first;
    first += n;
  }
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t slot = next[top.experts.data[i]]++;
    slot_tokens_[slot] = static_cast<int32_t>(i / k);
    slot_weights_[slot] = top.weights.data[i];
  }
}

void CpuBackend::pack_groups(const Buffer& packed, Mat<const float> t, bool by_slot) {
  pool_.run(static_cast<int64_t>(groups_.size()), [&](int64_t g, int) {
    const Group& group = groups_[g];
    const int64_t tiles = n_tiles(group.n, tiles_);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t first = tile_start(group.n, tiles, i), count = tile_start(group.n, tiles, i + 1) - first;
      const int64_t slot = group.first + first;
      uint8_t* tile = packed.as<uint8_t>() + slot * token_bytes(t.cols, true);
      if (by_slot)
        pack_tile(tile, {t.row(slot), count, t.cols}, nullptr, count, true);
      else
        pack_tile(tile, t, slot_tokens_.data() + slot, count, true);
    }
  });
}

// The products of all experts with their tokens. A unit is some panels of one expert, and units come expert after expert, so
// that an expert's tokens stay in the caches of those at work on it. Rows that several experts add to take them in order of
// their ids: a unit waits until the one with the same panels of the expert before is done, which was begun long ago.
template <class Finish>
void CpuBackend::expert_products(const Weight& weight, const Buffer& packed, int64_t n_tokens, const Finish& finish) {
  const int64_t panels = ceil_div(weight.rows, kPanelRows), n_groups = static_cast<int64_t>(groups_.size());
  const int64_t long_ago = 2 * pool_.size(),
                parts = std::min(panels, std::max(long_ago, ceil_div(n_units(panels * n_groups, n_tokens, 32), n_groups)));
  const auto panels_of = [&](int64_t unit) {
    return weight.storage.as<uint8_t>() + groups_[unit / parts].expert * panels * panel_bytes(weight);
  };
  for (int64_t i = 0; i < parts; ++i) experts_added_[i].store(0, std::memory_order_relaxed);
  pool_.run(n_groups * parts, [&](int64_t unit, int) {
    const int64_t g = unit / parts, part = unit % parts, likely = unit + pool_.size();
    MatmulArgs args;
    args.panels = panels_of(unit);
    args.mxfp4 = true;
    args.rows = weight.rows;
    args.cols = weight.cols;
    args.first_panel = tile_start(panels, parts, part);
    args.n_panels = tile_start(panels, parts, part + 1) - args.first_panel;
    if (likely < n_groups * parts)
      args.next = panels_of(likely) + tile_start(panels, parts, likely % parts) * panel_bytes(weight);
    args.packed = packed.as<uint8_t>() + groups_[g].first * token_bytes(weight.cols, true);
    args.n_tokens = groups_[g].n;
    finish(args, groups_[g]);
    const bool adds = args.epilogue == Epilogue::kAdd;
    while (adds && experts_added_[part].load(std::memory_order_acquire) != g) std::this_thread::yield();
    multiply(args);
    if (adds) experts_added_[part].store(g + 1, std::memory_order_release);
  });
}

// Into packed_hidden_; fast: into hidden_, for a panel gives 16 inputs of the next product, and a scale takes 32.
void CpuBackend::swiglu_products(const ExpertWeights& experts, int64_t n_tokens) {
  const int64_t rows = experts.gate_up->rows, inner = rows / 2;
  expert_products(*experts.gate_up, packed_, n_tokens, [&](MatmulArgs& args, const Group& group) {
    args.bias = experts.gate_up_bias + group.expert * rows;
    args.epilogue = Epilogue::kSwiglu;
    args.packed_out = packed_hidden_.as<uint8_t>() + group.first * token_bytes(inner, true);
    args.out = hidden_.as<float>() + group.first * inner;
    args.out_stride = inner;
    args.swiglu_limit = experts.swiglu_limit;
  });
}

void CpuBackend::down_products(Mat<float> x, const ExpertWeights& experts) {
  const int64_t rows = experts.down->rows;
  expert_products(*experts.down, packed_hidden_, x.rows, [&](MatmulArgs& args, const Group& group) {
    args.bias = experts.down_bias + group.expert * rows;
    args.epilogue = Epilogue::kAdd;
    args.out = x.data;
    args.out_stride = x.cols;
    args.out_rows = slot_tokens_.data() + group.first;
    args.out_weights = slot_weights_.data() + group.first;
  });
}

void CpuBackend::moe_add(Mat<float> x, Mat<const float> t, const Routing& top, const ExpertWeights& experts) {
  group_by_expert(top, experts.gate_up->experts);
  pack_groups(packed_, t, false);
  swiglu_products(experts, t.rows);
  if (fast_) pack_groups(packed_hidden_, hidden_.mat<const float>(top.experts.size(), experts.down->cols), true);
  down_products(x, experts);
}

}  // namespace
}  // namespace gptoss::cpu

namespace gptoss {

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options) { return std::make_unique<cpu::CpuBackend>(options); }

}  // namespace gptoss
