// One table lists every tensor: its name in both layouts, its shape, and where it goes.
#include "weights.h"

#include <algorithm>

#include "bf16.h"
#include "check.h"
#include "mxfp4.h"

namespace gptoss {
namespace {

using Put = std::function<void(const HostTensor&)>;
using Add =
    std::function<void(Layout layout, std::string name, std::vector<int64_t> shape, std::vector<DType> dtypes, Put put)>;

const std::vector<DType> kMatrix = {DType::BF16}, kVector = {DType::BF16, DType::F32}, kBytes = {DType::U8};

// Vectors are kept in float32.
void put_vector(Backend& backend, Buffer& buffer, int64_t first, const HostTensor& tensor) {
  int64_t n = 1;
  for (int64_t extent : tensor.shape) n *= extent;
  std::vector<float> values(n);
  if (tensor.dtype == DType::BF16) {
    const bf16* source = static_cast<const bf16*>(tensor.data);
    std::transform(source, source + n, values.begin(), bf16_to_float);
  } else {
    std::copy_n(static_cast<const float*>(tensor.data), n, values.begin());
  }
  backend.copy_in(buffer.as<float>() + first, values.data(), n * sizeof(float));
}

struct Table {
  Backend* backend;  // null when only the specifications are wanted
  Weights* weights;
  const ModelConfig& config;
  const Add& add;

  void vector(Layout layout, const std::string& name, std::vector<int64_t> shape, Buffer& buffer, int64_t first = 0) const {
    add(layout, name, std::move(shape), kVector,
        [backend = backend, &buffer, first](const HostTensor& tensor) { put_vector(*backend, buffer, first, tensor); });
  }
  void matrix(Layout layout, const std::string& name, int64_t rows, int64_t cols, Weight& weight, int64_t first_row = 0) const {
    add(layout, name, {rows, cols}, kMatrix,
        [backend = backend, &weight, first_row](const HostTensor& tensor) { backend->load_rows(weight, first_row, tensor); });
  }
  void experts(Layout layout, const std::string& prefix, const char* dot, int64_t rows, int64_t cols, Weight& weight) const {
    const int64_t blocks = cols / kMxBlock;
    add(layout, prefix + dot + "blocks", {config.n_experts, rows, blocks, kMxBlockBytes}, kBytes,
        [backend = backend, &weight](const HostTensor& tensor) { backend->load_mxfp4_blocks(weight, tensor); });
    add(layout, prefix + dot + "scales", {config.n_experts, rows, blocks}, kBytes,
        [backend = backend, &weight](const HostTensor& tensor) { backend->load_mxfp4_scales(weight, tensor); });
  }

  void hugging_face_layer(int64_t index, LayerWeights& w) const {
    const auto hf = Layout::kHuggingFace;
    const int64_t H = config.hidden_size, I = config.intermediate_size, E = config.n_experts;
    const int64_t q = config.q_size(), kv = config.kv_size();
    const std::string layer = "model.layers." + std::to_string(index) + ".", attn = layer + "self_attn.", mlp = layer + "mlp.";
    vector(hf, layer + "input_layernorm.weight", {H}, w.attn_norm);
    const std::pair<const char*, std::pair<int64_t, int64_t>> parts[] = {
        {"q_proj", {0, q}}, {"k_proj", {q, kv}}, {"v_proj", {q + kv, kv}}};
    for (const auto& [name, place] : parts) {
      matrix(hf, attn + name + ".weight", place.second, H, w.qkv, place.first);
      vector(hf, attn + name + ".bias", {place.second}, w.qkv_bias, place.first);
    }
    vector(hf, attn + "sinks", {config.n_heads}, w.sinks);
    matrix(hf, attn + "o_proj.weight", H, q, w.out);
    vector(hf, attn + "o_proj.bias", {H}, w.out_bias);
    vector(hf, layer + "post_attention_layernorm.weight", {H}, w.mlp_norm);
    matrix(hf, mlp + "router.weight", E, H, w.router);
    vector(hf, mlp + "router.bias", {E}, w.router_bias);
    experts(hf, mlp + "experts.gate_up_proj", "_", 2 * I, H, w.gate_up);
    vector(hf, mlp + "experts.gate_up_proj_bias", {E, 2 * I}, w.gate_up_bias);
    experts(hf, mlp + "experts.down_proj", "_", H, I, w.down);
    vector(hf, mlp + "experts.down_proj_bias", {E, H}, w.down_bias);
  }

  void original_layer(int64_t index, LayerWeights& w) const {
    const auto original = Layout::kOriginal;
    const int64_t H = config.hidden_size, I = config.intermediate_size, E = config.n_experts;
    const std::string block = "block." + std::to_string(index) + ".", attn = block + "attn.", mlp = block + "mlp.";
    vector(original, attn + "norm.scale", {H}, w.attn_norm);
    matrix(original, attn + "qkv.weight", config.qkv_size(), H, w.qkv);
    vector(original, attn + "qkv.bias", {config.qkv_size()}, w.qkv_bias);
    vector(original, attn + "sinks", {config.n_heads}, w.sinks);
    matrix(original, attn + "out.weight", H, config.q_size(), w.out);
    vector(original, attn + "out.bias", {H}, w.out_bias);
    vector(original, mlp + "norm.scale", {H}, w.mlp_norm);
    matrix(original, mlp + "gate.weight", E, H, w.router);
    vector(original, mlp + "gate.bias", {E}, w.router_bias);
    experts(original, mlp + "mlp1_weight", ".", 2 * I, H, w.gate_up);
    vector(original, mlp + "mlp1_bias", {E, 2 * I}, w.gate_up_bias);
    experts(original, mlp + "mlp2_weight", ".", H, I, w.down);
    vector(original, mlp + "mlp2_bias", {E, H}, w.down_bias);
  }

  void all(Layout layout) const {
    const int64_t V = config.vocab_size, H = config.hidden_size;
    const bool hf = layout == Layout::kHuggingFace;
    matrix(layout, hf ? "model.embed_tokens.weight" : "embedding.weight", V, H, weights->embedding);
    for (int64_t i = 0; i < config.n_layers; ++i)
      hf ? hugging_face_layer(i, weights->layers[i]) : original_layer(i, weights->layers[i]);
    vector(layout, hf ? "model.norm.weight" : "norm.scale", {H}, weights->norm);
    matrix(layout, hf ? "lm_head.weight" : "unembedding.weight", V, H, weights->unembedding);
  }
};

std::vector<const char*> dtype_names(const std::vector<DType>& dtypes) {
  std::vector<const char*> names;
  for (DType dtype : dtypes) names.push_back(dtype_name(dtype));
  return names;
}

}  // namespace

std::vector<TensorSpec> expected_tensors(const ModelConfig& config, Layout layout) {
  config.validate();
  std::vector<TensorSpec> specs;
  Weights shapes_only;
  shapes_only.layers.resize(config.n_layers);
  const Add add = [&](Layout, std::string name, std::vector<int64_t> shape, std::vector<DType> dtypes, const Put&) {
    specs.push_back({std::move(name), std::move(shape), std::move(dtypes)});
  };
  Table{nullptr, &shapes_only, config, add}.all(layout);
  return specs;
}

namespace {

// Calls vector(buffer, n) and matrix(weight, format, experts, rows, cols, order) for every field.
template <class Vector, class Matrix>
void for_each_field(Weights& weights, const ModelConfig& config, const Vector& vector, const Matrix& matrix) {
  const int64_t H = config.hidden_size, I = config.intermediate_size, E = config.n_experts, V = config.vocab_size;
  weights.layers.resize(config.n_layers);
  matrix(weights.embedding, WeightFormat::kTable, 1, V, H, RowOrder::kPlain);
  for (LayerWeights& layer : weights.layers) {
    vector(layer.attn_norm, H);
    matrix(layer.qkv, WeightFormat::kBf16, 1, config.qkv_size(), H, RowOrder::kRopePairs);
    vector(layer.qkv_bias, config.qkv_size());
    vector(layer.sinks, config.n_heads);
    matrix(layer.out, WeightFormat::kBf16, 1, H, config.q_size(), RowOrder::kPlain);
    vector(layer.out_bias, H);
    vector(layer.mlp_norm, H);
    matrix(layer.router, WeightFormat::kTable, 1, E, H, RowOrder::kPlain);
    vector(layer.router_bias, E);
    matrix(layer.gate_up, WeightFormat::kMxfp4, E, 2 * I, H, RowOrder::kGateUp);
    vector(layer.gate_up_bias, E * 2 * I);
    matrix(layer.down, WeightFormat::kMxfp4, E, H, I, RowOrder::kPlain);
    vector(layer.down_bias, E * H);
  }
  vector(weights.norm, H);
  matrix(weights.unembedding, WeightFormat::kBf16, 1, V, H, RowOrder::kPlain);
}

}  // namespace

int64_t weight_bytes(const Backend& backend, const ModelConfig& config) {
  int64_t bytes = 0;
  Weights shapes_only;
  for_each_field(
      shapes_only, config, [&](Buffer&, int64_t n) { bytes += n * static_cast<int64_t>(sizeof(float)); },
      [&](Weight&, WeightFormat format, int64_t experts, int64_t rows, int64_t cols, RowOrder) {
        bytes += static_cast<int64_t>(backend.weight_bytes(format, experts, rows, cols));
      });
  return bytes;
}

WeightLoader::WeightLoader(Backend& backend, const ModelConfig& config) : backend_(backend) {
  for_each_field(
      weights_, config, [&](Buffer& buffer, int64_t n) { buffer = backend.allocate(n * sizeof(float)); },
      [&](Weight& weight, WeightFormat format, int64_t experts, int64_t rows, int64_t cols, RowOrder order) {
        weight = backend.make_weight(format, experts, rows, cols, order);
      });
  const Add add = [this](Layout layout, std::string name, std::vector<int64_t> shape, std::vector<DType> dtypes, Put put) {
    slots_[static_cast<int>(layout)][name] = {{name, std::move(shape), std::move(dtypes)}, std::move(put)};
  };
  for (Layout layout : {Layout::kHuggingFace, Layout::kOriginal}) Table{&backend, &weights_, config, add}.all(layout);
}

WeightLoader::~WeightLoader() = default;

void WeightLoader::load(const HostTensor& tensor) {
  for (auto& slots : slots_) {
    const auto found = slots.find(tensor.name);
    if (found == slots.end()) continue;
    Slot& slot = found->second;
    CHECK(tensor.shape == slot.spec.shape, tensor.name, ": its shape is ", tensor.shape, ", but the config makes it ",
          slot.spec.shape);
    CHECK(std::count(slot.spec.dtypes.begin(), slot.spec.dtypes.end(), tensor.dtype) > 0, tensor.name, ": its dtype is ",
          dtype_name(tensor.dtype), ", but must be one of ", dtype_names(slot.spec.dtypes));
    slot.put(tensor);
    slot.loaded = true;
    return;
  }
  CHECK(false, tensor.name, ": no such tensor in a gpt-oss model of this shape");
}

Weights WeightLoader::finish() {
  std::vector<std::string> missing[2];
  for (int layout = 0; layout < 2; ++layout) {
    for (const auto& [name, slot] : slots_[layout])
      if (!slot.loaded) missing[layout].push_back(name);
  }
  std::vector<std::string>& fewest = missing[0].size() <= missing[1].size() ? missing[0] : missing[1];
  if (!fewest.empty()) {
    const size_t n = fewest.size();
    fewest.resize(std::min<size_t>(n, 3));
    CHECK(false, n, n == 1 ? " tensor is" : " tensors are", " missing: ", fewest, n > 3 ? " ..." : "");
  }
  backend_.finish_loading();
  return std::move(weights_);
}

}  // namespace gptoss
