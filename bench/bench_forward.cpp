// Prompt and decode speed of a whole model of random weights: no Python, no files.
//
//   bench_forward --shape 20b --prompt 512 --decode 32 --context 0,8192 --batch 1 --threads 2 --json
//
// For every context length: fills the cache with that many tokens, then times `decode` single-token steps of `batch` sequences.
// A row's percent is of the larger of two limits, the time to read the step's bytes and the time to do its products, with the
// bandwidth and the peak of bfloat16 products measured just before (on a card: once, at the start).
#include <chrono>
#include <cstdio>

#include "cost.h"
#include "cuda_machine.h"
#include "machine.h"
#include "options.h"
#include "random_model.h"

namespace gptoss::bench {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// The limits of the machine that a model runs on.
class Limiter {
 public:
  Limiter(const Backend& backend, Precision precision) : isa_(backend.isa()), int8_(precision == Precision::kFast) {
    const std::string device = backend.device();
    if (device.rfind("cuda:", 0) == 0) {
      const CudaLimits card = measure_cuda(card_of(device));
      limits_ = {card.bytes_per_second, card.dot_flops, 0};
    } else {
      pool_ = std::make_unique<cpu::ThreadPool>(backend.threads());
      reader_ = std::make_unique<MemoryReader>(true);
    }
  }
  const Limits& measure() {
    if (pool_) limits_ = measure_limits(*pool_, *reader_, isa_, int8_);
    return limits_;
  }

 private:
  std::string isa_;
  bool int8_;
  Limits limits_;
  std::unique_ptr<cpu::ThreadPool> pool_;
  std::unique_ptr<MemoryReader> reader_;
};

struct Bench {
  std::shared_ptr<Model> model;
  std::string shape;
  bool json;
  std::unique_ptr<Limiter> limiter;
  uint64_t state = 7;

  std::vector<int32_t> random_tokens(int64_t n) {
    std::vector<int32_t> tokens(n);
    for (int32_t& token : tokens) token = static_cast<int32_t>(next_random(state) % model->config().vocab_size);
    return tokens;
  }

  Sampler greedy_sampler() const {
    SamplingOptions options;
    options.temperature = 0;
    return Sampler(model->config().vocab_size, options);
  }

  double step(const std::vector<StepItem>& items) {
    const auto start = Clock::now();
    model->step(items, nullptr, [] {});
    return seconds_since(start);
  }

  // Appends n tokens in the largest steps; returns the seconds taken.
  double read(Sequence& sequence, int64_t n, Want want) {
    double total = 0;
    while (n > 0) {
      const int64_t now = std::min(n, model->max_batch_tokens());
      n -= now;
      total += step({{&sequence, random_tokens(now), n == 0 ? want : Want::kNothing, nullptr}});
    }
    return total;
  }

  void prompt(int64_t n, int64_t repeats) {
    const Limits limits = limiter->measure();
    std::vector<double> times;
    for (int64_t i = 0; i < repeats; ++i) {
      Sequence sequence(model);
      times.push_back(read(sequence, n, Want::kLast));
    }
    StepCost cost;
    for (int64_t done = 0, now = 0; done < n; done += now) {
      now = std::min(n - done, model->max_batch_tokens());
      const StepCost step = step_cost(model->config(), now, 1, done, done + now == n, model->precision());
      cost = {cost.bytes + step.bytes, cost.flops + step.flops};
    }
    row("prompt", n, 1, static_cast<double>(n), median(times), cost, limits);
  }

  void decode(int64_t context, int64_t batch, int64_t steps) {
    std::vector<std::unique_ptr<Sequence>> sequences;
    std::vector<Sampler> samplers(batch, greedy_sampler());
    for (int64_t i = 0; i < batch; ++i) {
      sequences.push_back(std::make_unique<Sequence>(model));
      if (context > 0) read(*sequences.back(), context, Want::kNothing);
    }
    const Limits limits = limiter->measure();
    std::vector<double> times;
    for (int64_t i = 0; i < steps + 2; ++i) {
      std::vector<StepItem> items;
      for (int64_t b = 0; b < batch; ++b) items.push_back({sequences[b].get(), random_tokens(1), Want::kLast, &samplers[b]});
      const double seconds = step(items);
      if (i >= 2) times.push_back(seconds);  // two to warm up
    }
    row("decode", context, batch, static_cast<double>(batch), median(times),
        step_cost(model->config(), batch, batch, context + steps / 2, batch, model->precision()), limits);
  }

  void row(const char* what, int64_t context, int64_t batch, double tokens, double seconds, const StepCost& cost,
           const Limits& limits) const {
    const double percent = 100 * std::max(cost.bytes / limits.bytes_per_second, cost.flops / limits.dot_flops) / seconds;
    if (json)
      std::printf(
          "{\"bench\": \"%s\", \"shape\": \"%s\", \"layers\": %ld, \"tokens\": %ld, \"batch\": %ld, \"device\": \"%s\", "
          "\"isa\": \"%s\", \"precision\": \"%s\", \"threads\": %d, \"tokens_per_second\": %.3f, \"seconds\": %.6f, "
          "\"gb_per_s\": %.3f, "
          "\"gflop_per_s\": %.3f, \"limit_gb_per_s\": %.3f, \"limit_gflop_per_s\": %.3f, \"percent\": %.2f}\n",
          what, shape.c_str(), static_cast<long>(model->config().n_layers), static_cast<long>(context),
          static_cast<long>(batch), model->backend().device().c_str(), model->backend().isa().c_str(),
          precision_name(model->precision()), model->backend().threads(), tokens / seconds, seconds,
          1e-9 * cost.bytes / seconds, 1e-9 * cost.flops / seconds, 1e-9 * limits.bytes_per_second, 1e-9 * limits.dot_flops,
          percent);
    else
      std::printf("%-7s %6ld tokens  batch %-3ld %10.2f tok/s %10.2f ms %8.1f GB/s %10.1f GFLOP/s %6.1f%% of the limit\n", what,
                  static_cast<long>(context), static_cast<long>(batch), tokens / seconds, seconds * 1e3,
                  1e-9 * cost.bytes / seconds, 1e-9 * cost.flops / seconds, percent);
    std::fflush(stdout);
  }
};

void run(int argc, char** argv) {
  const Options options(argc, argv,
                        {{"shape", "20b"},
                         {"layers", "0"},
                         {"prompt", "512"},
                         {"decode", "32"},
                         {"context", "0"},
                         {"batch", "1"},
                         {"threads", "0"},
                         {"device", "cpu"},
                         {"isa", ""},
                         {"repeats", "3"},
                         {"step", "512"},
                         {"precision", "exact"}});
  ModelOptions model_options;
  model_options.backend = {options.text("device"), static_cast<int>(options.number("threads")), options.text("isa"),
                           options.number("step", 1)};
  model_options.backend.precision = precision_of(options.text("precision"));
  if (options.text("device") != "cpu") {  // cache for these rows only: random weights and the limits need room on the card too
    const auto most = [&](const char* name) {
      int64_t n = 1;
      for (int64_t value : options.numbers(name)) n = std::max(n, value);
      return n;
    };
    model_options.max_context = std::max(most("prompt"), most("context") + most("decode") + 2);
    model_options.max_sequences = most("batch");
  }
  const std::vector<int64_t> prompts = options.numbers("prompt"), contexts = options.numbers("context");
  const std::vector<int64_t> batches = options.numbers("batch", 1);
  const int64_t repeats = options.number("repeats", 1), steps = options.number("decode");
  const auto start = Clock::now();
  Bench bench{random_model(preset(options.text("shape"), options.number("layers")), model_options), options.text("shape"),
              options.json(), nullptr};
  bench.limiter = std::make_unique<Limiter>(bench.model->backend(), bench.model->precision());
  if (!bench.json) std::printf("random weights made in %.1f s\n", seconds_since(start));
  for (int64_t n : prompts)
    if (n > 0) bench.prompt(n, repeats);
  if (steps > 0)
    for (int64_t batch : batches)
      for (int64_t context : contexts) bench.decode(context, batch, steps);
}

}  // namespace
}  // namespace gptoss::bench

int main(int argc, char** argv) {
  return gptoss::bench::exit_status("bench_forward", [&] { gptoss::bench::run(argc, argv); });
}
