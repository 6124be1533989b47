// A pool of threads for work of microseconds: workers spin for a while after a job, then sleep.
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

  void run_erased(int64_t n_units, Call call, const void* context);
  void take_units(int thread);
  void worker(int thread);

  int process_;
  std::vector<std::thread> workers_;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  int64_t n_units_ = 0;
  alignas(64) std::atomic<int64_t> next_unit_{0};
  alignas(64) std::atomic<uint32_t> job_{0};      // changes when a job starts; workers wait on it
  alignas(64) std::atomic<uint32_t> running_{0};  // workers not done with the current job
  std::atomic<bool> stop_{false};
};

}  // namespace gptoss::cpu
