// Every operation of the CUDA backend, at the shapes of 20b and 120b, as one decode step, many of them, or a prompt takes it.
//
//   bench_ops_cuda --shape 20b --op moe_add --tokens 1,64,2048 --json
//   bench_ops_cuda --shape tiny --tokens 1,9,130 --calls 1        every operation once: for compute-sanitizer
//
// `percent` is of the larger of two limits, the time to move the operation's bytes and the time to do its arithmetic, measured
// on the card at the start of the run (cuda_machine.cu). Calls are queued one behind the other without graphs: where a call
// takes less than a launch, about 3 us of the host, the row says so and not what a graph would reach.
#include <cstdio>
#include <set>

#include "cuda_machine.h"
#include "machine.h"
#include "operations.h"
#include "options.h"

namespace gptoss::bench {
namespace {

std::vector<Case> cases(const Options& options) {
  const std::vector<std::string> ops = options.texts("op");
  const std::set<std::string> wanted(ops.begin(), ops.end());
  std::vector<Case> result;
  const auto add = [&](const Case& c) {
    if (wanted.empty() || wanted.count(c.op)) result.push_back(c);
  };
  for (const std::string& shape : options.texts("shape"))
    for (int64_t n : options.numbers("tokens", 1)) {
      for (const char* op : {"linear_qkv", "linear_o", "moe_add", "rmsnorm", "norm_route"}) add({op, shape, "", n});
      if (n <= 64) add({"unembedding", shape, "", n});  // the model asks for no more at a time
      add({"norm_qkv", shape, "", n, 1, 1024});
      for (int64_t context : options.numbers("context"))
        for (int64_t window : {0, 128}) {
          add({"attention", shape, "", n, n, context, window});             // n sequences decode
          if (n > 1) add({"attention", shape, "", n, 1, context, window});  // a chunk of a prompt
        }
    }
  return result;
}

void run_case(Backend& backend, cpu::ThreadPool& pool, const Case& c, const CudaLimits& limits, const Options& options) {
  const int64_t calls = options.number("calls", 1), rounds = calls > 1 ? 5 : 1;
  Operation operation(backend, pool, c, calls > 1);
  if (calls > 1) operation.run(2);
  std::vector<double> times;
  for (int64_t i = 0; i < rounds; ++i) times.push_back(seconds_of([&] { operation.run(calls); }) / static_cast<double>(calls));
  const Cost& cost = operation.cost();
  const double seconds = median(times), memory = cost.bytes / limits.bytes_per_second;
  const double arithmetic = cost.dot_flops / limits.dot_flops, percent = 100 * std::max(memory, arithmetic) / seconds;
  if (!options.json())
    std::printf(
        "%-12s %-4s tokens %-5ld sequences %-4ld context %-6ld window %-4ld %10.2f us %9.1f GB/s %9.1f TFLOP/s %6.1f%%\n",
        c.op.c_str(), c.shape.c_str(), static_cast<long>(c.tokens), static_cast<long>(c.sequences),
        static_cast<long>(c.context), static_cast<long>(c.window), 1e6 * seconds, 1e-9 * cost.bytes / seconds,
        1e-12 * cost.dot_flops / seconds, percent);
  else
    std::printf(
        "{\"bench\": \"op\", \"op\": \"%s\", \"shape\": \"%s\", \"tokens\": %ld, \"sequences\": %ld, \"context\": %ld, "
        "\"window\": %ld, \"isa\": \"%s\", \"us\": %.3f, \"gb_per_s\": %.2f, \"tflop_per_s\": %.3f, \"percent\": %.2f}\n",
        c.op.c_str(), c.shape.c_str(), static_cast<long>(c.tokens), static_cast<long>(c.sequences),
        static_cast<long>(c.context), static_cast<long>(c.window), backend.isa().c_str(), 1e6 * seconds,
        1e-9 * cost.bytes / seconds, 1e-12 * cost.dot_flops / seconds, percent);
  std::fflush(stdout);
}

void run(int argc, char** argv) {
  const Options options(argc, argv,
                        {{"shape", "20b"},
                         {"op", ""},
                         {"tokens", "1,8,64,512,2048"},
                         {"context", "0,4096"},
                         {"calls", "32"},
                         {"device", "cuda"}});
  int64_t most = 1;
  for (int64_t n : options.numbers("tokens")) most = std::max(most, n);
  BackendOptions backend_options;
  backend_options.device = options.text("device");
  backend_options.max_batch_tokens = most;
  cpu::ThreadPool pool(cpu::default_threads());
  const std::string device = make_cuda_backend(backend_options)->device();  // cuda:N
  const CudaLimits limits = measure_cuda(card_of(device));
  std::printf(
      options.json() ? "{\"bench\": \"limits\", \"gb_per_s\": %.1f, \"tflop_per_s\": %.1f}\n" : "%.0f GB/s, %.0f TFLOP/s\n",
      1e-9 * limits.bytes_per_second, 1e-12 * limits.dot_flops);
  for (const Case& c : cases(options)) {
    const auto backend = make_cuda_backend(backend_options);  // its work space is for one shape
    run_case(*backend, pool, c, limits, options);
  }
}

}  // namespace
}  // namespace gptoss::bench

int main(int argc, char** argv) {
  return gptoss::bench::exit_status("bench_ops_cuda", [&] { gptoss::bench::run(argc, argv); });
}
