// What this machine can do: memory bandwidth by streams, pages and threads; peaks of float32 FMA, bfloat16 and int8 dots.
//
//   bench_machine --benchmark_filter=threads:2 --benchmark_format=json
#include <benchmark/benchmark.h>

#include <map>
#include <memory>

#include "machine.h"

namespace gptoss::bench {
namespace {

// Median of the calls, with the unit's count of one call.
template <class Work>
void time_calls(benchmark::State& state, const char* unit, double count, const Work& work) {
  std::vector<double> times;
  for (auto _ : state) times.push_back(seconds_of(work));
  state.counters[unit] = 1e-9 * count / median(times);
}

cpu::ThreadPool& pool_of(int threads) {
  static std::map<int, std::unique_ptr<cpu::ThreadPool>> pools;
  auto& pool = pools[threads];
  if (!pool) pool = std::make_unique<cpu::ThreadPool>(threads);
  return *pool;
}

void memory(benchmark::State& state, bool huge_pages, int streams, int threads) {
  static std::unique_ptr<MemoryReader> reader;
  static bool reader_pages = false;
  if (!reader || reader_pages != huge_pages) {
    reader.reset();
    reader = std::make_unique<MemoryReader>(reader_pages = huge_pages);
  }
  cpu::ThreadPool& pool = pool_of(threads);
  time_calls(state, "GB/s", static_cast<double>(kReadBytes), [&] { reader->read(pool, streams); });
}

void arithmetic(benchmark::State& state, const Peak& peak, int threads) {
  constexpr int64_t kRounds = 100000;
  cpu::ThreadPool& pool = pool_of(threads);
  time_calls(state, peak.op == "dot_int8" ? "GOP/s" : "GFLOP/s", peak.ops_per_round * kRounds * 4 * threads,
             [&] { pool.run(threads * 4, [&](int64_t, int) { peak.run(kRounds); }); });
}

void register_all() {
  std::vector<int> counts;
  const int most = cpu::default_threads();
  for (int n = 1; n < most; n *= 2) counts.push_back(n);
  counts.push_back(most);
  const auto add = [](const std::string& name, auto work) {
    benchmark::RegisterBenchmark(name.c_str(), work)->UseRealTime()->Unit(benchmark::kMillisecond);
  };
  for (bool huge : {false, true})
    for (int streams : {1, 2, 4})
      for (int threads : counts)
        add("memory/pages:" + std::string(huge ? "huge" : "small") + "/streams:" + std::to_string(streams) +
                "/threads:" + std::to_string(threads),
            [=](benchmark::State& state) { memory(state, huge, streams, threads); });
  for (const Peak& peak : supported_peaks())
    for (int threads : counts)
      add(peak.op + "/" + peak.isa + "/threads:" + std::to_string(threads),
          [=](benchmark::State& state) { arithmetic(state, peak, threads); });
}

}  // namespace
}  // namespace gptoss::bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  gptoss::bench::register_all();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
