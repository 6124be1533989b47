#include "memory_plan.h"

#include <algorithm>
#include <iomanip>

#include "check.h"
#include "weights.h"

namespace gptoss {
namespace {

constexpr int64_t kMostSequences = 256;  // where nobody asks for a number
// With a prefix cache: one window page for so many full ones, beside those that sequences need. A window page is wanted where a
// sequence ended, or left another; the others are read once.
constexpr int64_t kFullPerWindow = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string gib(int64_t bytes) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(bytes < (int64_t{1} << 30) ? 3 : 1) << static_cast<double>(bytes) / (1 << 30)
       << " GiB";
  return text.str();
}

struct Planner {
  const ModelConfig& config;
  int64_t page_bytes;  // keys and values of one layer
  int64_t n_full = 0, n_window = 0, widest = 0;

  Planner(const Backend& backend, const ModelConfig& config)
      : config(config), page_bytes(2 * backend.page_bytes(config.n_kv_heads)) {
    for (int64_t window : config.layer_windows) {
      widest = std::max(widest, window);
      ++(window ? n_window : n_full);
    }
  }

  // Between steps a sequence keeps the pages that its window may still touch; a step adds those of its new tokens.
  int64_t window_pages(const Limits& limits) const {
    if (n_window == 0) return 0;
    const int64_t kept = ceil_div(widest - 1, kPageTokens) + 1;
    const int64_t pages = limits.sequences * (kept + 1) + ceil_div(limits.batch_tokens, kPageTokens);
    return std::min(pages, limits.sequences * context_pages(limits));
  }
  int64_t context_pages(const Limits& limits) const { return ceil_div(limits.context, kPageTokens); }
  // With the scratch page of each pool.
  int64_t cache_bytes(int64_t full_pages, int64_t window_pages) const {
    return page_bytes * (n_full * (full_pages + 1) + n_window * (window_pages + 1));
  }
};

}  // namespace

MemoryPlan plan_memory(const Backend& backend, const ModelConfig& config, const Limits& asked, bool prefix_cache,
                       const std::function<int64_t(const Limits&)>& workspace) {
  const Planner planner(backend, config);
  const int64_t available = static_cast<int64_t>(std::min<size_t>(backend.available_memory(), INT64_MAX));
  MemoryPlan plan;
  plan.limits = asked;
  plan.weight_bytes = weight_bytes(backend, config);
  if (asked.context == 0) plan.limits.context = config.max_context;
  if (asked.sequences == 0) {
    // So many that half of what the weights leave is still there for the layers that see everything.
    int64_t& n = plan.limits.sequences = kMostSequences;
    const auto taken = [&] { return workspace(plan.limits) + planner.cache_bytes(0, planner.window_pages(plan.limits)); };
    while (n > 1 && taken() > (available - plan.weight_bytes) / 2) n /= 2;
  }
  plan.workspace_bytes = workspace(plan.limits);
  plan.window_pages = planner.window_pages(plan.limits);

  const bool all = asked.context > 0 && asked.sequences > 0;
  const int64_t most = plan.limits.sequences * planner.context_pages(plan.limits);
  const int64_t needed = planner.cache_bytes(all ? most : 1, plan.window_pages);
  const int64_t left = available - plan.weight_bytes - plan.workspace_bytes;
  if (needed > left)
    FAIL("this model does not fit into the memory of ", backend.device(), ": its weights take ", gib(plan.weight_bytes),
         ", work space ", gib(plan.workspace_bytes), ", a cache for ", plan.limits.sequences,
         plan.limits.sequences == 1 ? " sequence" : " sequences", all ? join(" of ", plan.limits.context, " tokens ") : " ",
         gib(needed), all ? "" : " at the least", "; only ", gib(available), " are available");
  const int64_t full_page = planner.page_bytes * planner.n_full, window_page = planner.page_bytes * planner.n_window;
  const int64_t spare = left - planner.cache_bytes(1, plan.window_pages);
  const int64_t cost = prefix_cache ? full_page + ceil_div(window_page, kFullPerWindow) : full_page;
  plan.full_pages = all || full_page == 0 ? most : std::min(most, 1 + spare / cost);
  plan.cached_pages = -1;
  if (!prefix_cache) return plan;
  const int64_t rest = left - planner.cache_bytes(plan.full_pages, plan.window_pages);
  if (window_page > 0) plan.window_pages += std::min(ceil_div(plan.full_pages, kFullPerWindow), rest / window_page);
  // Not all of a large pool: on a CPU its memory is nobody's until it is used. But one sequence can always come back whole.
  plan.cached_pages = std::max(plan.full_pages / 4, planner.context_pages(plan.limits));
  return plan;
}

}  // namespace gptoss
