// A pool of threads for work of microseconds: workers spin for a while after a job, then sleep. A worker joins a job only while
// it has units left, and the caller waits only for those that joined: so one that the system has not given a processor to costs
// nothing but its share of the work. With GPTOSS_PIN_THREADS=1, workers are pinned to a processor each; the caller's thread is
// not the pool's to pin.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace gptoss::cpu {

// As many threads as this process may use: OMP_NUM_THREADS if set, else the smaller of its affinity and its cgroup's quota.
int default_threads();

class ThreadPool {
 public:
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls work(unit, thread) for every unit in [0, n_units), in any order on any thread, and returns when all are done. Units
  // are handed out one by one, so a slow core takes fewer. One caller at a time. work must not throw.
  template <class Work>
  void run(int64_t n_units, const Work& work) {
    run_erased(
        n_units, [](const void* context, int64_t unit, int thread) { (*static_cast<const Work*>(context))(unit, thread); },
        &work);
  }

 private:
  using Call = void (*)(const void* context, int64_t unit, int thread);

  static constexpr uint64_t kOpen = uint64_t{1} << 31, kWorkers = kOpen - 1;

  void run_erased(int64_t n_units, Call call, const void* context);
  void take_units(int thread);
  bool join(uint32_t job);
  void worker(int thread);

  int process_;
  std::vector<std::thread> workers_;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  int64_t n_units_ = 0;
  alignas(64) std::atomic<int64_t> next_unit_{0};
  alignas(64) std::atomic<uint32_t> job_{0};    // the number of the newest job; workers wait on it
  alignas(64) std::atomic<uint64_t> state_{0};  // job number << 32 | kOpen while it may be joined | workers in it
  std::atomic<bool> stop_{false};
};

}  // namespace gptoss::cpu
