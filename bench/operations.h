// One backend operation with its operands, ready to be repeated: what bench_ops times.
//
// Operands that a model reads from memory (weights, cache) take turns among copies that no cache holds together. What the
// step has just written (activations) stays where it is, as it does in a model.
#pragma once
#include <unistd.h>

#include <functional>
#include <numeric>

#include "random_model.h"

namespace gptoss::bench {

struct Case {
  std::string op;     // linear_qkv, linear_o, unembedding, moe_add, attention, rmsnorm, route, rope_append
  std::string shape;  // 20b, 120b, tiny
  std::string isa;
  int64_t tokens = 1;
  int64_t sequences = 1;  // the tokens are divided among them
  int64_t context = 0;    // tokens already in each sequence's cache
  int64_t window = 0;
  Precision precision = Precision::kExact;
};

// What one call must do, however it is done.
struct Cost {
  double bytes = 0;       // operands read and results written, each once
  double dot_flops = 0;   // of products with rounded operands
  double fma_flops = 0;   // of float32 arithmetic
  bool in_cache = false;  // reads only what was just written: memory's speed is no limit to it
};

inline size_t cold_bytes() {
  const long l3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return std::max<size_t>(size_t{192} << 20, l3 > 0 ? 2 * static_cast<size_t>(l3) : 0);
}

class Operation {
 public:
  // cold: operands that a model reads from memory come from there. Else there is one of each.
  Operation(Backend& backend, cpu::ThreadPool& pool, const Case& c, bool cold = true)
      : backend_(backend), pool_(pool), case_(c), config_(preset(c.shape, 1)), cold_(cold) {
    n_ = c.tokens;
    backend_.reserve(config_, {n_, n_, c.context + 1});
    x_ = activations(n_ * config_.qkv_size());
    make_batch();
    if (c.op == "linear_qkv")
      linear(config_.qkv_size(), config_.hidden_size, false);
    else if (c.op == "linear_o")
      linear(config_.hidden_size, config_.q_size(), true);
    else if (c.op == "unembedding")
      linear(config_.vocab_size, config_.hidden_size, false);
    else if (c.op == "moe_add")
      moe_add();
    else if (c.op == "attention")
      attention();
    else if (c.op == "rope_append")
      rope_append();
    else if (c.op == "norm_qkv")
      norm_qkv();
    else if (c.op == "route" || c.op == "norm_route")
      route(c.op == "norm_route");
    else if (c.op == "rmsnorm")
      rmsnorm();
    else
      FAIL("unknown operation ", c.op);
  }

  // Several calls are waited for together.
  void run(int64_t calls = 1) {
    backend_.begin(batch_);
    for (int64_t i = 0; i < calls; ++i) call_(turn_++);
    backend_.synchronize();
  }
  const Cost& cost() const { return cost_; }

 private:
  Buffer random(size_t bytes, RandomBits bits) {
    Buffer buffer = backend_.allocate(bytes);
    std::vector<uint8_t> host(bytes);
    fill_random(pool_, host.data(), bytes, bits, ++seed_);
    backend_.copy_in(buffer.data(), host.data(), bytes);
    return buffer;
  }
  // float32 of +-2^-8 to 2^-4
  Buffer activations(int64_t n) { return random(n * 4, {0x81FFFFFF81FFFFFF, 0x3B8000003B800000}); }

  Weight matrix(WeightFormat format, int64_t rows, int64_t cols, RowOrder order = RowOrder::kPlain) {
    constexpr int64_t kRows = 4096;
    Weight weight = backend_.make_weight(format, 1, rows, cols, order);
    std::vector<uint8_t> source(kRows * cols * 2);
    fill_random(pool_, source.data(), source.size(), kRandomBf16, ++seed_);
    for (int64_t first = 0; first < rows; first += kRows)
      backend_.load_rows(weight, first, {"weight", source.data(), DType::BF16, {std::min(kRows, rows - first), cols}});
    return weight;
  }

  Weight experts(int64_t rows, int64_t cols, RowOrder order) {
    const int64_t n = config_.n_experts;
    Weight weight = backend_.make_weight(WeightFormat::kMxfp4, n, rows, cols, order);
    const size_t bytes = n * rows * cols / 2;
    const std::unique_ptr<uint8_t[]> source(new uint8_t[bytes]);
    fill_random(pool_, source.get(), bytes, kRandomCodes, ++seed_);
    backend_.load_mxfp4_blocks(weight, {"blocks", source.get(), DType::U8, {n, rows, cols / 32, 16}});
    fill_random(pool_, source.get(), bytes / 16, kRandomScales, ++seed_);
    backend_.load_mxfp4_scales(weight, {"scales", source.get(), DType::U8, {n, rows, cols / 32}});
    return weight;
  }

  int64_t copies(size_t bytes) const { return cold_ ? std::min<int64_t>(1024, cold_bytes() / bytes + 1) : 1; }

  // Sequences of the same length, each with pages of its own.
  void make_batch() {
    const int64_t each = n_ / case_.sequences, pages = (case_.context + each + kPageTokens - 1) / kPageTokens;
    pages_.resize(case_.sequences);
    for (int64_t s = 0; s < case_.sequences; ++s) {
      pages_[s].pages.resize(pages);
      std::iota(pages_[s].pages.begin(), pages_[s].pages.end(), static_cast<int32_t>(s * pages));
      batch_.sequences.push_back({s * each, each, case_.context, &pages_[s], &pages_[s]});
      for (int64_t i = 0; i < each; ++i) {
        batch_.tokens.push_back(static_cast<int32_t>(i));
        batch_.positions.push_back(static_cast<int32_t>(case_.context + i));
        batch_.sequence_of.push_back(static_cast<int32_t>(s));
      }
    }
    n_pages_ = pages * case_.sequences;
  }

  // As many layers' caches as it takes to be cold.
  void make_cache() {
    const size_t bytes = n_pages_ * backend_.page_bytes(config_.n_kv_heads);
    const int64_t n = copies(2 * bytes);
    for (Buffer* buffer : {&keys_, &values_}) *buffer = random(bytes * n, kRandomBf16);
    for (int64_t i = 0; i < n; ++i)
      layers_.push_back({keys_.as<uint8_t>() + i * bytes, values_.as<uint8_t>() + i * bytes, case_.window});
  }

  void linear(int64_t rows, int64_t cols, bool add) {
    const int64_t n = copies(rows * cols);
    for (int64_t i = 0; i < n; ++i) weights_.push_back(matrix(WeightFormat::kBf16, rows, cols));
    bias_ = activations(rows);
    out_ = backend_.allocate(n_ * rows * 4);
    const int64_t weight_bytes = case_.precision == Precision::kFast ? rows * cols * 66 / 64 : rows * cols * 2;
    cost_.bytes = static_cast<double>(weight_bytes + n_ * (cols + (add ? 2 : 1) * rows) * 4);
    cost_.dot_flops = 2.0 * static_cast<double>(n_ * rows * cols);
    call_ = [=, this](int64_t i) {
      const auto out = out_.mat<float>(n_, rows);
      const auto t = x_.mat<const float>(n_, cols);
      const Weight& weight = weights_[i % n];
      add ? backend_.linear_add(out, t, weight, bias_.as<float>()) : backend_.linear(out, t, weight, bias_.as<float>());
    };
  }

  void moe_add() {
    const int64_t H = config_.hidden_size, I = config_.intermediate_size, E = config_.n_experts, k = config_.experts_per_token;
    constexpr int64_t kRoutings = 32;
    weights_.push_back(experts(2 * I, H, RowOrder::kGateUp));
    weights_.push_back(experts(H, I, RowOrder::kPlain));
    bias_ = activations(E * 2 * I);
    out_ = backend_.allocate(n_ * H * 4);
    const auto scores = std::vector<float>(n_ * k, 1.0f / static_cast<float>(k));
    top_weights_ = backend_.allocate(n_ * k * 4);
    backend_.copy_in(top_weights_.data(), scores.data(), n_ * k * 4);
    ids_ = backend_.allocate(kRoutings * n_ * k * 4);
    const double used = make_routings(kRoutings, E, k) / kRoutings;  // experts a step touches
    const double expert_bytes = static_cast<double>(3 * H * I) * 17 / 32;
    cost_.bytes = used * expert_bytes + static_cast<double>(n_ * H * 4 * 3);
    cost_.dot_flops = 2.0 * static_cast<double>(n_ * k * 3 * H * I);
    call_ = [=, this](int64_t i) {
      const Routing top = {{ids_.as<int32_t>() + i % kRoutings * n_ * k, n_, k}, top_weights_.mat<float>(n_, k)};
      backend_.moe_add(out_.mat<float>(n_, H), x_.mat<const float>(n_, H), top,
                       {&weights_[0], bias_.as<float>(), &weights_[1], bias_.as<float>(), 7.0f});
    };
  }

  // Every token its own k experts, all equally likely; one token alone takes them in turn. Returns the sum of the numbers of
  // experts that are used.
  double make_routings(int64_t routings, int64_t E, int64_t k) {
    std::vector<int32_t> ids, all(E);
    std::iota(all.begin(), all.end(), 0);
    uint64_t state = 11;
    double used = 0;
    for (int64_t r = 0; r < routings; ++r) {
      std::vector<bool> seen(E);
      for (int64_t token = 0; token < n_; ++token)
        for (int64_t j = 0; j < k; ++j) {
          if (n_ > 1) std::swap(all[j], all[j + next_random(state) % (E - j)]);
          ids.push_back(n_ > 1 ? all[j] : static_cast<int32_t>((r * k + j) % E));
          seen[ids.back()] = true;
        }
      used += static_cast<double>(std::count(seen.begin(), seen.end(), true));
    }
    backend_.copy_in(ids_.data(), ids.data(), ids.size() * 4);
    return used;
  }

  void attention() {
    const int64_t kv_heads = config_.n_kv_heads, q_size = config_.q_size(), each = n_ / case_.sequences;
    make_cache();
    bias_ = activations(config_.n_heads);
    out_ = backend_.allocate(n_ * q_size * 4);
    double scores = 0;  // keys seen, over all tokens
    for (int32_t position : batch_.positions)
      scores += case_.window ? std::min<double>(position + 1, case_.window) : position + 1;
    const int64_t end = case_.context + each, keys = case_.window ? std::min(end, case_.window + each - 1) : end;
    cost_.bytes = static_cast<double>(case_.sequences * keys * config_.kv_size() * 4 + n_ * q_size * 8);
    cost_.dot_flops = cost_.fma_flops = 2.0 * scores * static_cast<double>(q_size);  // q k: rounded; shares x v: float32
    call_ = [=, this](int64_t i) {
      backend_.attention(out_.mat<float>(n_, q_size), x_.mat<const float>(n_, q_size), layers_[i % layers_.size()],
                         bias_.as<float>(), kv_heads);
    };
  }

  void make_rope() {
    const int64_t positions = case_.context + n_;
    std::vector<float> cos(positions * kHeadDim / 2), sin(cos.size());
    fill_rope_table(config_, 0, positions, cos.data(), sin.data());
    for (auto [buffer, table] : {std::pair{&cos_, &cos}, std::pair{&sin_, &sin}}) {
      *buffer = backend_.allocate(table->size() * 4);
      backend_.copy_in(buffer->data(), table->data(), table->size() * 4);
    }
  }
  RopeTable rope() const {
    const int64_t positions = case_.context + n_;
    return {cos_.mat<const float>(positions, kHeadDim / 2), sin_.mat<const float>(positions, kHeadDim / 2)};
  }

  void rope_append() {
    make_cache();
    make_rope();
    out_ = backend_.allocate(n_ * config_.q_size() * 4);
    cost_.bytes = static_cast<double>(n_ * (4 * (config_.qkv_size() + config_.q_size()) + 4 * config_.kv_size()));
    cost_.in_cache = true;
    call_ = [this](int64_t i) {
      backend_.rope_append(out_.mat<float>(n_, config_.q_size()), layers_[i % layers_.size()],
                           x_.mat<const float>(n_, config_.qkv_size()), rope(), config_.n_kv_heads);
    };
  }

  void norm_qkv() {
    const int64_t H = config_.hidden_size, rows = config_.qkv_size(), n = copies(rows * H * 2);
    make_cache();
    make_rope();
    for (int64_t i = 0; i < n; ++i) weights_.push_back(matrix(WeightFormat::kBf16, rows, H, RowOrder::kRopePairs));
    bias_ = activations(std::max(rows, H));
    out_ = backend_.allocate(n_ * config_.q_size() * 4);
    normed_ = backend_.allocate(n_ * H * 4);
    qkv_ = backend_.allocate(n_ * rows * 4);
    cost_.bytes = static_cast<double>(rows * H * 2 + n_ * (4 * H + 4 * config_.q_size() + 4 * config_.kv_size()));
    cost_.dot_flops = 2.0 * static_cast<double>(n_ * rows * H);
    call_ = [=, this](int64_t i) {
      backend_.norm_qkv(out_.mat<float>(n_, config_.q_size()), layers_[i % layers_.size()], x_.mat<const float>(n_, H),
                        {bias_.as<float>(), 1e-5f}, weights_[i % n], bias_.as<float>(), rope(), config_.n_kv_heads,
                        normed_.mat<float>(n_, H), qkv_.mat<float>(n_, rows));
    };
  }

  void route(bool norm) {
    const int64_t H = config_.hidden_size, E = config_.n_experts, k = config_.experts_per_token, n = copies(E * H * 2);
    for (int64_t i = 0; i < n; ++i) weights_.push_back(matrix(WeightFormat::kTable, E, H));
    bias_ = activations(std::max(E, H));
    ids_ = backend_.allocate(n_ * k * 4);
    top_weights_ = backend_.allocate(n_ * k * 4);
    normed_ = backend_.allocate(n_ * H * 4);
    cost_.bytes = static_cast<double>(E * H * 2 + n_ * H * (norm ? 8 : 4));
    cost_.fma_flops = 2.0 * static_cast<double>(n_ * E * H);
    call_ = [=, this](int64_t i) {
      const Routing top = {ids_.mat<int32_t>(n_, k), top_weights_.mat<float>(n_, k)};
      const auto x = x_.mat<const float>(n_, H);
      const Weight& weight = weights_[i % n];
      if (norm)
        backend_.norm_route(top, normed_.mat<float>(n_, H), x, {bias_.as<float>(), 1e-5f}, weight, bias_.as<float>());
      else
        backend_.route(top, x, weight, bias_.as<float>());
    };
  }

  void rmsnorm() {
    const int64_t H = config_.hidden_size;
    bias_ = activations(H);
    out_ = backend_.allocate(n_ * H * 4);
    cost_.bytes = static_cast<double>(n_ * H * 8);
    cost_.in_cache = true;
    call_ = [=, this](int64_t) {
      backend_.rmsnorm(out_.mat<float>(n_, H), x_.mat<const float>(n_, H), bias_.as<float>(), 1e-5f, nullptr);
    };
  }

  Backend& backend_;
  cpu::ThreadPool& pool_;
  Case case_;
  ModelConfig config_;
  bool cold_;
  int64_t n_ = 0, n_pages_ = 0, turn_ = 0;
  uint64_t seed_ = 0;
  Batch batch_;
  std::vector<PageList> pages_;
  std::vector<Weight> weights_;
  std::vector<KvLayer> layers_;
  Buffer x_, out_, bias_, ids_, top_weights_, normed_, qkv_, keys_, values_, cos_, sin_;
  std::function<void(int64_t)> call_;
  Cost cost_;
};

}  // namespace gptoss::bench
