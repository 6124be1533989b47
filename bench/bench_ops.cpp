// Every operation of the backend, at the shapes of 20b and 120b, for 1 to 512 tokens, with each instruction set.
//
//   bench_ops --benchmark_filter='moe_add/20b.*avx512bf16' --benchmark_format=json
//   bench_ops --precision=fast --benchmark_filter='linear.*tokens:512'
//   OMP_NUM_THREADS=1 bench_ops --benchmark_filter='linear_qkv.*tokens:(1|512)/'
//
// `percent` is of the larger of two limits, the time to move the operation's bytes and the time to do its arithmetic, both
// measured in the same run, at most ten seconds before the row. The rates are of the median call. Rows without it work on what
// a cache holds.
#include <benchmark/benchmark.h>

#include "cpu/isa.h"
#include "machine.h"
#include "operations.h"

namespace gptoss::bench {
namespace {

constexpr int64_t kMaxTokens = 512;
constexpr int64_t kMaxLogitRows = 64;  // the model asks for no more at a time

cpu::ThreadPool& pool() {
  static cpu::ThreadPool instance(cpu::default_threads());
  return instance;
}

// The machine's limits for one instruction set, not older than ten seconds: neighbours come and go.
const Limits& limits_of(const std::string& isa, Precision precision) {
  static MemoryReader reader(true);
  static Limits limits;
  static std::string measured;
  static std::chrono::steady_clock::time_point when;
  const auto now = std::chrono::steady_clock::now();
  if (measured == isa && now - when < std::chrono::seconds(10)) return limits;
  limits = measure_limits(pool(), reader, isa, precision == Precision::kFast);
  measured = isa;
  when = std::chrono::steady_clock::now();
  return limits;
}

// Making the operands takes longer than running them: the last operation is kept while its case is repeated.
Operation& operation_of(const std::string& name, const Case& c) {
  static std::unique_ptr<Backend> backend;
  static std::unique_ptr<Operation> operation;
  static std::string current;
  if (current == name) return *operation;
  operation.reset();
  if (!backend || backend->isa() != c.isa) {
    BackendOptions options{"cpu", pool().size(), c.isa, kMaxTokens};
    options.precision = c.precision;
    backend = make_cpu_backend(options);
  }
  operation = std::make_unique<Operation>(*backend, pool(), c);
  current = name;
  return *operation;
}

void run_case(benchmark::State& state, const std::string& name, const Case& c) {
  Operation& operation = operation_of(name, c);
  const Limits limits = limits_of(c.isa, c.precision);
  operation.run();
  std::vector<double> times;
  for (auto _ : state) times.push_back(seconds_of([&] { operation.run(); }));
  const Cost& cost = operation.cost();
  const double seconds = median(times), flops = cost.dot_flops + cost.fma_flops;
  const double memory = cost.bytes / limits.bytes_per_second;
  const double arithmetic = cost.dot_flops / limits.dot_flops + cost.fma_flops / limits.fma_flops;
  state.counters["median_us"] = 1e6 * seconds;
  state.counters["GB/s"] = 1e-9 * cost.bytes / seconds;
  if (flops > 0) state.counters["GFLOP/s"] = 1e-9 * flops / seconds;
  if (!cost.in_cache) state.counters["percent"] = 100 * std::max(memory, arithmetic) / seconds;
  state.counters["limit_GB/s"] = 1e-9 * limits.bytes_per_second;
  state.counters["limit_GFLOP/s"] = 1e-9 * limits.dot_flops;
}

void add(Case c, Precision precision) {
  c.precision = precision;
  std::string name = c.op + "/" + c.shape + "/" + c.isa;
  if (precision != Precision::kExact) name += std::string("/precision:") + precision_name(precision);
  if (c.op == "attention") {
    name += "/context:" + std::to_string(c.context) + "/window:" + std::to_string(c.window);
    name += "/sequences:" + std::to_string(c.sequences);
  }
  name += "/threads:" + std::to_string(pool().size()) + "/tokens:" + std::to_string(c.tokens);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) { run_case(state, name, c); })
      ->UseRealTime()
      ->Unit(benchmark::kMicrosecond);
}

void register_all(Precision precision) {
  for (const std::string& isa : cpu::supported_isas())
    for (const std::string shape : {"20b", "120b"}) {
      const std::vector<int64_t> counts = {1, 2, 8, 32, 128, kMaxTokens};
      for (const std::string op : {"linear_qkv", "linear_o", "unembedding", "moe_add", "rmsnorm", "route"})
        for (int64_t n : counts)
          if (op != "unembedding" || n <= kMaxLogitRows) add({op, shape, isa, n}, precision);
      for (int64_t n : counts) add({"rope_append", shape, isa, n, 1, 2048}, precision);
      for (auto [context, window] : {std::pair{128, 0}, {2048, 0}, {8192, 0}, {8192, 128}})
        for (int64_t n : counts) {
          add({"attention", shape, isa, n, 1, context, window}, precision);
          if (n > 1 && n <= 32) add({"attention", shape, isa, n, n, context, window}, precision);
        }
    }
}

}  // namespace
}  // namespace gptoss::bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  std::string precision = "exact";
  if (const std::string option = "--precision="; argc > 1 && std::string(argv[1]).rfind(option, 0) == 0) {
    precision = std::string(argv[1]).substr(option.size());
    argv[1] = argv[0];
    --argc, ++argv;
  }
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  try {
    gptoss::bench::register_all(gptoss::precision_of(precision));
    benchmark::RunSpecifiedBenchmarks();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_ops: %s\n", error.what());
    return 1;
  }
  benchmark::Shutdown();
  return 0;
}
