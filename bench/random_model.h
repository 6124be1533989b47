// A model of any shape with random weights, made in memory: for benchmarks of the C++ core without Python and without files.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/memory.h"
#include "cpu/threads.h"
#include "cuda_machine.h"
#include "model.h"
#include "random_bits.h"

namespace gptoss::bench {

// "20b", "120b" or "tiny"; layers > 0 replaces the number of layers.
inline ModelConfig preset(const std::string& name, int64_t layers) {
  ModelConfig c;
  const bool tiny = name == "tiny", large = name == "120b";
  CHECK(tiny || large || name == "20b", "shape must be 20b, 120b or tiny, not ", name);
  c.hidden_size = c.intermediate_size = tiny ? 128 : 2880;
  c.n_layers = layers > 0 ? layers : tiny ? 4 : large ? 36 : 24;
  c.n_heads = tiny ? 16 : 64;
  c.n_kv_heads = tiny ? 2 : 8;
  c.head_dim = kHeadDim;
  c.n_experts = tiny ? 8 : large ? 128 : 32;
  c.experts_per_token = 4;
  c.vocab_size = tiny ? 1024 : 201088;
  c.max_context = 131072;
  c.rms_norm_eps = 1e-5;
  c.rope_theta = 150000;
  c.rope_factor = 32;
  c.rope_original_context = 4096;
  c.rope_beta_fast = 32;
  c.rope_beta_slow = 1;
  c.rope_attention_factor = 1.3465735902799727;  // 0.1 ln 32 + 1
  c.swiglu_limit = 7;
  for (int64_t i = 0; i < c.n_layers; ++i) c.layer_windows.push_back(i % 2 == 0 ? 128 : 0);
  return c;
}

// Fills memory with them, by all threads; 16 generators of xorshift64 side by side (Marsaglia 2003), so that it vectorizes.
inline void fill_random(cpu::ThreadPool& pool, void* memory, size_t bytes, RandomBits bits, uint64_t seed) {
  constexpr size_t kUnit = size_t{1} << 20;
  constexpr int kLanes = 16;
  pool.run(static_cast<int64_t>((bytes + kUnit - 1) / kUnit), [&](int64_t unit, int) {
    uint64_t start = (seed << 32) + static_cast<uint64_t>(unit) + 1, state[kLanes], words[kLanes];
    for (uint64_t& lane : state) lane = next_random(start);
    uint8_t* to = static_cast<uint8_t*>(memory) + unit * kUnit;
    const size_t n = std::min(kUnit, bytes - unit * kUnit);
    for (size_t i = 0; i < n; i += sizeof words) {
      for (int lane = 0; lane < kLanes; ++lane) {
        uint64_t x = state[lane];
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        state[lane] = x;
        words[lane] = (x & bits.mask) + bits.base;
      }
      std::memcpy(to + i, words, std::min(n - i, sizeof words));
    }
  });
}

inline std::shared_ptr<Model> random_model(const ModelConfig& config, const ModelOptions& options) {
  auto model = std::make_shared<Model>(config, options);
  const std::vector<TensorSpec> specs = expected_tensors(config, Layout::kOriginal);
  const auto bytes_of = [](const TensorSpec& spec) {
    size_t n = spec.dtypes[0] == DType::BF16 ? 2 : 1;
    for (int64_t extent : spec.shape) n *= static_cast<size_t>(extent);
    return n;
  };
  size_t most = 0;
  for (const TensorSpec& spec : specs) most = std::max(most, bytes_of(spec));
  const bool card = options.backend.device != "cpu";
  const Buffer memory = cpu::allocate_pages(most);  // for all tensors in turn
  const Buffer on_card = card ? card_memory(card_of(options.backend.device), most) : Buffer();
  cpu::ThreadPool pool(options.backend.threads > 0 ? options.backend.threads : cpu::default_threads());
  uint64_t seed = 1;
  for (const TensorSpec& spec : specs) {
    const bool scales = spec.name.find("scales") != std::string::npos;
    const bool matrix = spec.name.find("weight") != std::string::npos;
    const RandomBits bits = spec.dtypes[0] == DType::BF16 ? kRandomBf16 : scales ? kRandomScales : kRandomCodes;
    const Buffer& place = card && matrix ? on_card : memory;
    if (card && matrix)
      fill_random_on_card(place, bytes_of(spec), bits, seed++);
    else
      fill_random(pool, place.data(), bytes_of(spec), bits, seed++);
    model->load({spec.name, place.data(), spec.dtypes[0], spec.shape, card && matrix});
  }
  model->finish_loading();
  return model;
}

}  // namespace gptoss::bench
