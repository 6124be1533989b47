// How a model divides its device's memory: weights, work space, and the cache of what is left. Decided before any of it is
// taken, so that a model that does not fit is refused before its checkpoint is read.
#pragma once
#include <functional>

#include "backend.h"

namespace gptoss {

struct MemoryPlan {
  Limits limits;
  int64_t weight_bytes = 0;
  int64_t workspace_bytes = 0;
  int64_t full_pages = 0;    // of the pool of the layers that see everything
  int64_t window_pages = 0;  // of the window layers' pool
  int64_t cached_pages = 0;  // that the prefix cache may keep for nobody; -1: no prefix cache
};

// asked: sequences or context are 0 where nobody asked for a number of them. workspace(limits): bytes of a model's work space.
// Throws, with the numbers, where weights, work space and cache do not fit: one page of cache, or all of what was asked for
// where both sequences and context were.
MemoryPlan plan_memory(const Backend& backend, const ModelConfig& config, const Limits& asked, bool prefix_cache,
                       const std::function<int64_t(const Limits&)>& workspace);

}  // namespace gptoss
