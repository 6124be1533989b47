// Steps that repeat, as CUDA graphs: what they launch is recorded once and then started with one call.
//
// A graph holds launch shapes and addresses, so it serves steps that have both alike: as many rows, pages of the same class,
// the same operations (GraphKey). What differs between them (tokens, positions, page numbers) lies in memory at fixed places.
#pragma once
#include <compare>
#include <functional>
#include <map>
#include <utility>

#include "batch.h"
#include "cuda/common.cuh"

namespace gptoss::cuda {

struct GraphKey {
  int64_t rows = 0;
  int64_t pages = 0;  // that one row may see, at most
  StepEnd end = StepEnd::kLayers;
  auto operator<=>(const GraphKey&) const = default;
};

// An executable graph.
class Graph {
 public:
  Graph() = default;
  // Records what `operations` gives to the stream. If they throw, the stream is as before.
  Graph(cudaStream_t stream, const std::function<void()>& operations) {
    cudaGraph_t recorded = nullptr;
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    try {
      operations();
    } catch (...) {
      if (cudaStreamEndCapture(stream, &recorded) == cudaSuccess) cudaGraphDestroy(recorded);
      cudaGetLastError();
      throw;
    }
    CUDA_CHECK(cudaStreamEndCapture(stream, &recorded));
    const cudaError_t status = cudaGraphInstantiate(&graph_, recorded, 0);
    cudaGraphDestroy(recorded);
    if (status != cudaSuccess) call_failed("cudaGraphInstantiate", status);
  }
  ~Graph() {
    if (graph_) cudaGraphExecDestroy(graph_);
  }
  Graph(Graph&& other) noexcept : graph_(std::exchange(other.graph_, nullptr)) {}
  Graph& operator=(Graph&& other) noexcept {
    std::swap(graph_, other.graph_);
    return *this;
  }

  explicit operator bool() const { return graph_; }
  void launch(cudaStream_t stream) const { CUDA_CHECK(cudaGraphLaunch(graph_, stream)); }

 private:
  cudaGraphExec_t graph_ = nullptr;
};

// The graphs of one stream. The first step of a kind runs plainly: that loads its kernels, which a capture might not, and
// many kinds come once only. The second is captured; from then on it is replayed.
class GraphCache {
 public:
  void run(const GraphKey& key, cudaStream_t stream, const std::function<void()>& operations) {
    if (graphs_.size() >= kMost && !graphs_.count(key)) {
      CUDA_CHECK(cudaStreamSynchronize(stream));
      clear();
    }
    const auto [entry, is_new] = graphs_.try_emplace(key);
    if (is_new) return operations();
    if (!entry->second) entry->second = Graph(stream, operations);
    entry->second.launch(stream);
  }
  void clear() { graphs_.clear(); }  // the stream has passed them

 private:
  static constexpr size_t kMost = 128;  // a graph takes some memory of the card
  std::map<GraphKey, Graph> graphs_;    // those seen once hold none yet
};

}  // namespace gptoss::cuda
