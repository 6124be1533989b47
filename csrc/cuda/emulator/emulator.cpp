// Fibers and their scheduler. See emulator.h.
#include "cuda/emulator/emulator.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/emulator/hopper.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define START_SWITCH(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define FINISH_SWITCH(save, bottom, size) __sanitizer_finish_switch_fiber(save, bottom, size)
#define UNPOISON(data, size) __asan_unpoison_memory_region(data, size)
#else
#define START_SWITCH(save, bottom, size) ((void)0)
#define FINISH_SWITCH(save, bottom, size) ((void)0)
#define UNPOISON(data, size) ((void)0)
#endif

// Saves the callee's registers and the stack pointer, and takes up another stack where it was left.
#if defined(__x86_64__)
extern "C" void gptoss_switch_stack(void** from, void* to);
__asm__(
    ".text\n.p2align 4\n.globl gptoss_switch_stack\n.hidden gptoss_switch_stack\n.type gptoss_switch_stack,@function\n"
    "gptoss_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".size gptoss_switch_stack,.-gptoss_switch_stack\n");
#else
#error "the emulator switches stacks on x86-64 only"
#endif

namespace gptoss::emulator {

Place place;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Fiber {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  void* pointer = nullptr;              // of the stack, while it does not run
  const uint32_t* waits_for = nullptr;  // a generation that must move on from `seen`
  uint32_t seen = 0;
  bool done = false, has_waited = false;
  dim3 index;
  std::vector<Copy> copies;
  int group = 0;  // that the next copies belong to
};

// A meeting point of the threads of a block or the lanes of a warp.
struct Meeting {
  uint32_t generation = 0;
  int arrived = 0;
  Combine combine = nullptr;
  void* lanes[32] = {};
};

struct Block {
  std::vector<Fiber*> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  std::vector<unsigned char> shared;
  const std::function<void()>* kernel = nullptr;
  const char* error = nullptr;
};

std::vector<std::unique_ptr<Fiber>> pool;
Block block;
Fiber* current = nullptr;
void* scheduler = nullptr;  // its stack pointer while a fiber runs
[[maybe_unused]] const void* scheduler_bottom = nullptr;
[[maybe_unused]] size_t scheduler_size = 0;

void to_scheduler() {
  Fiber* self = current;
  [[maybe_unused]] void* fake = nullptr;
  START_SWITCH(self->done ? nullptr : &fake, scheduler_bottom, scheduler_size);
  gptoss_switch_stack(&self->pointer, scheduler);
  FINISH_SWITCH(fake, &scheduler_bottom, &scheduler_size);
}

void run(Fiber& fiber) {
  current = &fiber;
  place.thread = fiber.index;
  [[maybe_unused]] void* fake = nullptr;
  START_SWITCH(&fake, fiber.stack.get(), kStackBytes);
  gptoss_switch_stack(&scheduler, fiber.pointer);
  FINISH_SWITCH(fake, nullptr, nullptr);
}

void fiber_main() {
  FINISH_SWITCH(nullptr, &scheduler_bottom, &scheduler_size);
  (*block.kernel)();
  if (!current->has_waited) block.error = "a thread that never waits for the kernel before it";
  current->done = true;
  to_scheduler();
  std::abort();
}

void prepare(Fiber& fiber, dim3 index) {
  fiber.waits_for = nullptr;
  fiber.done = fiber.has_waited = false;
  fiber.index = index;
  fiber.copies.clear();
  fiber.group = 0;
  UNPOISON(fiber.stack.get(), kStackBytes);  // frames that a failed block never left
  // Six registers, the address to return to, and the alignment a function expects on entry.
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) & ~uintptr_t{15};
  void** frame = reinterpret_cast<void**>(top) - 2;
  *frame = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--frame = nullptr;
  fiber.pointer = frame;
}

void run_block(const std::vector<int>& order) {
  size_t n_done = 0;
  while (n_done < order.size()) {
    bool moved = false;
    for (int i : order) {
      Fiber& fiber = *block.fibers[i];
      if (fiber.done || (fiber.waits_for && *fiber.waits_for == fiber.seen)) continue;
      fiber.waits_for = nullptr;
      run(fiber);
      moved = true;
      n_done += fiber.done;
      if (block.error) return;
    }
    if (!moved) {
      block.error = "a barrier, warp collective or phase that never ends: not all threads reach it";
      return;
    }
  }
}

uint32_t seed() {
  const char* text = std::getenv("GPTOSS_EMULATOR_SEED");
  return text ? static_cast<uint32_t>(std::atol(text)) : 0;
}

}  // namespace

void launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;  // threads of the host take turns
  const std::lock_guard lock(one_at_a_time);
  const int threads = static_cast<int>(size.x);
  CHECK(size.y == 1 && size.z == 1 && threads % 32 == 0 && threads >= 32 && threads <= 1024, "emulator: a block of ", threads,
        " threads");
  CHECK(shared_bytes <= (227u << 10), "emulator: ", shared_bytes, " bytes of shared memory");
  CHECK(grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.y < 65536 && grid.z < 65536, "emulator: a grid of ", grid.x, " x ",
        grid.y, " x ", grid.z);
  while (pool.size() < static_cast<size_t>(threads)) pool.push_back(std::make_unique<Fiber>());
  block.fibers.clear();
  for (int i = 0; i < threads; ++i) block.fibers.push_back(pool[i].get());
  block.kernel = &kernel;
  block.error = nullptr;
  place.block_size = size;
  place.grid_size = grid;
  std::mt19937 random(seed());
  const bool shuffled = seed() != 0;
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (shuffled) std::shuffle(blocks.begin(), blocks.end(), random);
  for (uint64_t b : blocks) {
    place.block = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                       static_cast<unsigned>(b / grid.x / grid.y));
    block.shared.assign(shared_bytes, 0xff);
    block.warps.assign(threads / 32, Meeting{});
    block.all = Meeting{};
    for (int i = 0; i < threads; ++i) prepare(*block.fibers[i], dim3(i, 0, 0));
    if (shuffled) std::shuffle(order.begin(), order.end(), random);
    begin_hopper_block(threads);
    run_block(order);
    if (!block.error) block.error = end_hopper_block();
    if (block.error) {
      const auto waiting = std::count_if(block.fibers.begin(), block.fibers.end(), [](Fiber* f) { return f->waits_for; });
      const auto done = std::count_if(block.fibers.begin(), block.fibers.end(), [](Fiber* f) { return f->done; });
      FAIL("emulator: ", block.error, ": block (", place.block.x, ", ", place.block.y, ", ", place.block.z, "), ", waiting,
           " of ", threads, " threads wait, ", done, " have returned");
    }
  }
}

void wait_for_change(const uint32_t& counter) {
  current->waits_for = &counter;
  current->seen = counter;
  to_scheduler();
}

void stop_block(const char* error) {
  block.error = error;
  to_scheduler();
}

unsigned char* shared_memory() { return block.shared.data(); }

void barrier() {
  Meeting& meeting = block.all;
  if (++meeting.arrived == static_cast<int>(block.fibers.size())) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  wait_for_change(meeting.generation);
}

void wait_for_previous() { current->has_waited = true; }

void collective(void* mine, Combine combine) {
  const unsigned thread = current->index.x;
  Meeting& meeting = block.warps[thread / 32];
  if (meeting.arrived == 0) meeting.combine = combine;
  if (meeting.combine != combine) {
    stop_block("two different warp collectives in one warp at a time");
  }
  meeting.lanes[thread % 32] = mine;
  if (++meeting.arrived == 32) {
    combine(meeting.lanes);
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  wait_for_change(meeting.generation);
}

void copy_async(void* shared, const void* global, int bytes) {
  current->copies.push_back({shared, global, bytes, current->group});
}

void commit_copies() { ++current->group; }

void wait_copies(int groups_left) {
  std::erase_if(current->copies, [&](const Copy& copy) {
    if (copy.group >= current->group - groups_left) return false;
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
    return true;
  });
}

}  // namespace gptoss::emulator

unsigned __ballot_sync(unsigned, int predicate) {
  struct Vote {
    int predicate;
    unsigned result;
  } mine{predicate, 0};
  gptoss::emulator::collective(&mine, [](void* const* lanes) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(static_cast<Vote*>(lanes[i])->predicate != 0) << i;
    for (int i = 0; i < 32; ++i) static_cast<Vote*>(lanes[i])->result = votes;
  });
  return mine.result;
}
