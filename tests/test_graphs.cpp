// Steps of a model in the emulator: which are recorded and which replayed, what a failed recording leaves, and that no step
// takes memory.
#include <cstdio>
#include <cstdlib>

#include "../bench/random_model.h"
#include "cuda/graphs.h"
#include "cuda/memory.h"

namespace gptoss {
namespace {

std::shared_ptr<Model> small_model() {
  ModelConfig config = bench::preset("tiny", 2);
  config.hidden_size = config.intermediate_size = 64;
  config.n_heads = 4;
  config.vocab_size = 64;
  ModelOptions options;
  options.backend.device = "cuda";
  options.backend.max_batch_tokens = 160;
  options.max_context = 600;
  options.max_sequences = 6;
  return bench::random_model(config, options);
}

struct Run {
  std::shared_ptr<Model> model = small_model();
  std::vector<std::unique_ptr<Sequence>> sequences;
  int polls = 0, throw_at = -1;

  // One token for each of n sequences; returns the logits.
  std::vector<float> decode(size_t n, Want want = Want::kLast) {
    while (sequences.size() < n) sequences.push_back(std::make_unique<Sequence>(model));
    std::vector<StepItem> items;
    for (size_t i = 0; i < n; ++i)
      items.push_back({sequences[i].get(), {static_cast<int32_t>(sequences[i]->length() % 64)}, want, nullptr});
    std::vector<float> logits(n * 64);
    polls = 0;
    model->step(items, logits.data(), [this] {
      if (polls++ == throw_at) throw std::runtime_error("interrupted");
    });
    return logits;
  }
};

void test_graph_cache() {
  cuda::Stream stream;
  cuda::GraphCache graphs;
  int calls = 0;
  std::vector<int> source = {1, 2, 3, 4}, target(4);
  const auto operations = [&] {
    ++calls;
    CUDA_CHECK(cudaMemcpyAsync(target.data(), source.data(), 16, cudaMemcpyHostToDevice, stream));
  };
  for (int i = 0; i < 5; ++i) {
    source[0] = i;
    graphs.run({4, 1, StepEnd::kLayers}, stream, operations);
    CHECK(target[0] == i, "run ", i, " gave ", target[0]);
  }
  CHECK(calls == 2, "one plain run and one recorded, not ", calls);
  graphs.run({4, 2, StepEnd::kLayers}, stream, operations);
  CHECK(calls == 3, "another kind of step is not a replay");
}

void test_replays() {
  Run run;
  for (int polls : {2, 2, 0, 0}) {
    run.decode(1);
    CHECK(run.polls == polls, "a step polled ", run.polls, " times, not ", polls);
  }
  for (int polls : {2, 2, 0}) {  // five are filled up to six, all there may be; so are six
    run.decode(polls == 2 ? 5 : 6);
    CHECK(run.polls == polls, "a step of five polled ", run.polls, " times, not ", polls);
  }
  run.decode(6, Want::kNothing);  // no logits behind it: another kind
  CHECK(run.polls == 2, "a step without logits polled ", run.polls, " times");
}

void test_same_bits_without_graphs() {
  Run with;
  setenv("GPTOSS_CUDA_GRAPHS", "0", 1);
  Run without;
  unsetenv("GPTOSS_CUDA_GRAPHS");
  for (size_t n : {1, 3, 6, 3, 1, 5, 5, 2, 2, 2}) {
    const std::vector<float> logits = with.decode(n);
    CHECK(logits == without.decode(n), "logits of ", n, " sequences differ");
    CHECK(without.polls == 2, "a step was replayed");
  }
}

void test_interrupted_recording() {
  Run run, calm;
  calm.decode(2), calm.decode(2);
  run.decode(2);
  run.throw_at = 1;
  try {
    run.decode(2);
    CHECK(false, "no exception");
  } catch (const std::runtime_error& error) {
    CHECK(std::string(error.what()) == "interrupted", error.what());
  }
  CHECK(run.sequences[0]->length() == 1, "a failed step left ", run.sequences[0]->length(), " tokens");
  run.throw_at = -1;
  run.decode(2);
  CHECK(run.polls == 2, "the step is recorded after all");
  CHECK(run.decode(2) == calm.decode(2) && run.polls == 0, "and then replayed");
}

size_t free_memory() {
  size_t free = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return free;
}

// What a model takes is what it was planned to, and no step takes more: not the largest prompt, nor the longest context.
void test_memory_is_planned() {
  const size_t before = free_memory();
  Run run;
  const size_t taken = before - free_memory();
  const size_t pages = 6 * 5 + 1 + 6 * 3 + 2 + 1;  // full and window, of one layer each
  const size_t planned = run.model->weight_bytes() + run.model->workspace_bytes() + pages * 2 * 2 * 128 * 64 * 2;
  CHECK(taken >= planned && taken < planned + (1 << 20), taken, " bytes were taken, ", planned, " planned");
  for (int round = 0; round < 3; ++round) {
    run.decode(6);
    for (auto& sequence : run.sequences) {
      const std::vector<int32_t> tokens(std::min<int64_t>(160, 590 - sequence->length()), 1);
      run.model->step({{sequence.get(), tokens, Want::kAll, nullptr}}, nullptr, [] {});
    }
  }
  run.decode(6), run.decode(4);
  CHECK(before - free_memory() == taken, before - free_memory(), " bytes after some steps, ", taken, " before them");
}

}  // namespace
}  // namespace gptoss

int main() {
  using namespace gptoss;
  try {
    test_graph_cache();
    test_replays();
    test_same_bits_without_graphs();
    test_interrupted_recording();
    test_memory_is_planned();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "test_graphs: %s\n", error.what());
    return 1;
  }
  std::puts("test_graphs: all passed");
}
