// A model of any shape with random weights, made in memory: for benchmarks of the C++ core without Python and without files.
#pragma once
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "model.h"

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

inline uint64_t next_random(uint64_t& state) {  // xorshift64*
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545F4914F6CDD1D;
}

// Random values a forward pass stays finite with: bfloat16 of +-2^-6 or so, codes of all kinds, scales about 2^-6.
inline void fill_random(const TensorSpec& spec, std::vector<uint8_t>& bytes, DType dtype, uint64_t& state) {
  const bool scales = spec.name.find("scales") != std::string::npos;
  uint64_t* words = reinterpret_cast<uint64_t*>(bytes.data());
  for (size_t i = 0; i < bytes.size() / 8; ++i) words[i] = next_random(state);
  if (dtype == DType::BF16) {  // keep sign and mantissa, exponents 119..122: 2^-8 to 2^-5
    for (size_t i = 0; i < bytes.size() / 8; ++i) words[i] = (words[i] & 0x81FF81FF81FF81FF) + 0x3B803B803B803B80;
  } else if (scales) {
    for (size_t i = 0; i < bytes.size() / 8; ++i) words[i] = (words[i] & 0x0101010101010101) + 0x7878787878787878;
  }
}

inline std::shared_ptr<Model> random_model(const ModelConfig& config, const ModelOptions& options) {
  auto model = std::make_shared<Model>(config, options);
  uint64_t state = 1;
  for (const TensorSpec& spec : expected_tensors(config, Layout::kOriginal)) {
    const DType dtype = spec.dtypes[0];
    size_t n = dtype == DType::BF16 ? 2 : 1;
    for (int64_t extent : spec.shape) n *= static_cast<size_t>(extent);
    std::vector<uint8_t> bytes((n + 7) / 8 * 8);
    fill_random(spec, bytes, dtype, state);
    model->load({spec.name, bytes.data(), dtype, spec.shape});
  }
  model->finish_loading();
  return model;
}

}  // namespace gptoss::bench
