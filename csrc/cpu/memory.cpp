#include "cpu/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>

#include "check.h"

namespace gptoss::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t read_number(const char* path) {
  size_t value = 0;
  std::ifstream file(path);
  return file >> value ? value : std::numeric_limits<size_t>::max();
}

}  // namespace

Buffer allocate_pages(size_t bytes) {
  if (bytes == 0) return {};
  const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  CHECK(size >= bytes && size < std::numeric_limits<size_t>::max() - kHugePage, "cannot allocate ", bytes, " bytes");
  // One huge page more than needed, then the ends are given back: mmap aligns to small pages only.
  void* raw = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) FAIL("cannot allocate ", bytes, " bytes of memory: ", std::strerror(errno));
  char* start = static_cast<char*>(raw);
  char* aligned = start + (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
  if (aligned > start) munmap(start, aligned - start);
  if (const size_t rest = start + kHugePage - aligned; rest > 0) munmap(aligned + size, rest);
  if (bytes >= kHugePage) madvise(aligned, size, MADV_HUGEPAGE);
  return Buffer(aligned, size, [](void* data, size_t n) { munmap(data, n); });
}

size_t available_memory() {
  size_t available = std::numeric_limits<size_t>::max();
  std::ifstream file("/proc/meminfo");
  std::string field;
  for (size_t kib; file >> field >> kib; file.ignore(256, '\n'))
    if (field == "MemAvailable:") available = kib * 1024;
  const size_t limit = read_number("/sys/fs/cgroup/memory.max"), used = read_number("/sys/fs/cgroup/memory.current");
  if (limit != std::numeric_limits<size_t>::max() && used < limit) available = std::min(available, limit - used);
  return available;
}

}  // namespace gptoss::cpu
