// The checkpoint's tensors, by name and in either layout, and the struct of weights the forward pass reads.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"

namespace gptoss {

struct LayerWeights {
  Buffer attn_norm;     // [H] f32
  Weight qkv;           // [(heads + 2 kv_heads) * 64, H]: q rows, then k, then v
  Buffer qkv_bias;      // [(heads + 2 kv_heads) * 64]
  Buffer sinks;         // [heads]
  Weight out;           // [H, heads * 64]
  Buffer out_bias;      // [H]
  Buffer mlp_norm;      // [H]
  Weight router;        // [E, H]
  Buffer router_bias;   // [E]
  Weight gate_up;       // [E, 2I, H]
  Buffer gate_up_bias;  // [E, 2I]
  Weight down;          // [E, H, I]
  Buffer down_bias;     // [E, H]
};

struct Weights {
  Weight embedding;  // [V, H]
  std::vector<LayerWeights> layers;
  Buffer norm;         // [H]
  Weight unembedding;  // [V, H]
};

// One tensor that a checkpoint of the given layout must have.
struct TensorSpec {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<DType> dtypes;  // any of these
};

enum class Layout { kHuggingFace, kOriginal };

std::vector<TensorSpec> expected_tensors(const ModelConfig& config, Layout layout);

// What the weights take on this backend.
int64_t weight_bytes(const Backend& backend, const ModelConfig& config);

// Takes tensors one by one, in any order, checks each and puts it where the backend wants it.
class WeightLoader {
 public:
  WeightLoader(Backend& backend, const ModelConfig& config);  // takes the memory of all weights
  ~WeightLoader();

  void load(const HostTensor& tensor);  // its memory may go when this returns
  Weights finish();                     // throws if a tensor is missing

 private:
  struct Slot {
    TensorSpec spec;
    std::function<void(const HostTensor&)> put;
    bool loaded = false;
  };

  Backend& backend_;
  Weights weights_;
  std::map<std::string, Slot> slots_[2];  // by layout
};

}  // namespace gptoss
