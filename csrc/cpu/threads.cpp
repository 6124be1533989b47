#include "cpu/threads.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <string>

#include "check.h"

namespace gptoss::cpu {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kSpins = 20000;  // about 0.1 ms: longer than the gaps between the operations of a step

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

int affinity_threads() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

// Whole processors of the cgroup's quota (v2, then v1); kMaxThreads where there is none.
int cgroup_threads() {
  double quota = -1, period = 0;
  std::string text;
  if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); v2 >> text >> period) {
    if (text != "max") quota = std::atof(text.c_str());
  } else {
    std::ifstream v1_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    if (!(v1_quota >> quota) || !(v1_period >> period)) quota = -1;
  }
  if (quota <= 0 || period <= 0) return kMaxThreads;
  return std::max(1, static_cast<int>(std::ceil(quota / period)));
}

// Not OMP_PROC_BIND: with it set, an OpenMP library in the same process pins the main thread, whose mask workers inherit.
bool pins_threads() {
  const char* text = std::getenv("GPTOSS_PIN_THREADS");
  return text && std::atoi(text) == 1;
}

// Pins the calling thread to the index-th of the processors it may use, around again where there are fewer.
void pin_thread(int index) {
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  index %= CPU_COUNT(&allowed);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || index-- > 0) continue;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    return;
  }
}

}  // namespace

int default_threads() {
  if (const char* text = std::getenv("OMP_NUM_THREADS"); text && *text) {
    const int n = std::atoi(text);
    if (n >= 1) return std::min(n, kMaxThreads);
  }
  return std::min(affinity_threads(), cgroup_threads());
}

ThreadPool::ThreadPool(int n_threads) : process_(getpid()) {
  CHECK(n_threads >= 1 && n_threads <= kMaxThreads, "threads must be between 1 and ", kMaxThreads, ", not ", n_threads);
  for (int i = 1; i < n_threads; ++i) workers_.emplace_back([this, i] { worker(i); });
}

ThreadPool::~ThreadPool() {
  if (getpid() != process_) {  // a forked child has no workers to join
    for (std::thread& worker : workers_) worker.detach();
    return;
  }
  stop_ = true;
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::take_units(int thread) {
  for (;;) {
    const int64_t unit = next_unit_.fetch_add(1, std::memory_order_relaxed);
    if (unit >= n_units_) return;
    call_(context_, unit, thread);
  }
}

void ThreadPool::run_erased(int64_t n_units, Call call, const void* context) {
  call_ = call;
  context_ = context;
  n_units_ = n_units;
  next_unit_.store(0, std::memory_order_relaxed);
  if (workers_.empty() || n_units <= 1) return take_units(0);
  const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
  state_.store(uint64_t{job} << 32 | kOpen, std::memory_order_release);
  job_.store(job, std::memory_order_release);
  job_.notify_all();
  take_units(0);
  state_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int spins = 0; (state_.load(std::memory_order_acquire) & kWorkers) != 0; ++spins) {
    if (spins < kSpins)
      pause_briefly();
    else
      std::this_thread::yield();  // more threads than processors: let the worker run
  }
}

// Counts this worker in, unless the job is over already.
bool ThreadPool::join(uint32_t job) {
  uint64_t state = state_.load(std::memory_order_acquire);
  while (state >> 32 == job && (state & kOpen))
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel, std::memory_order_acquire)) return true;
  return false;
}

void ThreadPool::worker(int thread) {
  if (pins_threads()) pin_thread(thread);
  uint32_t seen = 0;
  for (;;) {
    for (int spins = 0; job_.load(std::memory_order_acquire) == seen; ++spins) {
      if (spins < kSpins)
        pause_briefly();
      else
        job_.wait(seen, std::memory_order_acquire);
    }
    seen = job_.load(std::memory_order_acquire);
    if (stop_) return;
    if (!join(seen)) continue;
    take_units(thread);
    state_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace gptoss::cpu
