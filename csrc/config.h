// The shape and constants of one model, all of it read from the checkpoint's config.json.
#pragma once
#include <cstdint>
#include <vector>

#include "check.h"

namespace gptoss {

inline constexpr int64_t kHeadDim = 64;

struct ModelConfig {
  int64_t hidden_size = 0;
  int64_t n_layers = 0;
  int64_t n_heads = 0;
  int64_t n_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t n_experts = 0;
  int64_t experts_per_token = 0;
  int64_t intermediate_size = 0;
  int64_t vocab_size = 0;
  int64_t max_context = 0;
  double rms_norm_eps = 0;
  double rope_theta = 0;
  double rope_factor = 1;  // 1: plain RoPE, no YaRN
  int64_t rope_original_context = 0;
  double rope_beta_fast = 0;
  double rope_beta_slow = 0;
  bool rope_truncate = false;
  double rope_attention_factor = 1;  // cos and sin are multiplied by it
  double swiglu_limit = 0;
  std::vector<int64_t> layer_windows;  // [n_layers] 0: sees everything; else the number of keys, itself included

  int64_t q_size() const { return n_heads * head_dim; }
  int64_t kv_size() const { return n_kv_heads * head_dim; }
  int64_t qkv_size() const { return q_size() + 2 * kv_size(); }

  void validate() const {
    auto between = [](const char* field, int64_t value, int64_t low, int64_t high) {
      CHECK(value >= low && value <= high, field, " must be between ", low, " and ", high, ", not ", value);
    };
    auto positive = [](const char* field, double value) {
      CHECK(value > 0 && value < 1e30, field, " must be a positive finite number, not ", value);
    };
    between("hidden_size", hidden_size, 32, 1 << 20);
    between("n_layers", n_layers, 1, 4096);
    between("n_kv_heads", n_kv_heads, 1, 4096);
    between("n_heads", n_heads, n_kv_heads, 1 << 16);
    between("n_experts", n_experts, 1, 1 << 14);
    between("experts_per_token", experts_per_token, 1, n_experts);
    between("intermediate_size", intermediate_size, 32, 1 << 20);
    between("vocab_size", vocab_size, 1, 1 << 24);
    between("max_context", max_context, 1, 1 << 24);
    CHECK(head_dim == kHeadDim, "head_dim must be ", kHeadDim, ", not ", head_dim);
    CHECK(hidden_size % 32 == 0, "hidden_size must be a multiple of 32, not ", hidden_size);
    CHECK(intermediate_size % 32 == 0, "intermediate_size must be a multiple of 32, not ", intermediate_size);
    CHECK(n_heads % n_kv_heads == 0, "n_heads (", n_heads, ") must be a multiple of n_kv_heads (", n_kv_heads, ")");
    CHECK(experts_per_token <= 64, "experts_per_token must be at most 64, not ", experts_per_token);
    positive("rms_norm_eps", rms_norm_eps);
    positive("rope_theta", rope_theta);
    CHECK(rope_theta > 1, "rope_theta must be over 1, not ", rope_theta);
    positive("rope_factor", rope_factor);
    if (rope_factor != 1) {
      between("rope_original_context", rope_original_context, 1, 1 << 24);
      positive("rope_beta_fast", rope_beta_fast);
      positive("rope_beta_slow", rope_beta_slow);
    }
    positive("rope_attention_factor", rope_attention_factor);
    positive("swiglu_limit", swiglu_limit);
    CHECK(static_cast<int64_t>(layer_windows.size()) == n_layers, "layer_windows has ", layer_windows.size(), " entries for ",
          n_layers, " layers");
    for (int64_t window : layer_windows) between("layer_windows", window, 0, 1 << 24);
  }
};

}  // namespace gptoss
