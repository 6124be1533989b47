#include "kv_cache.h"

#include <algorithm>

#include "check.h"

namespace gptoss {

int32_t PagePool::take() {
  if (!free_.empty()) {
    const int32_t page = free_.back();
    free_.pop_back();
    return page;
  }
  return static_cast<int32_t>(next_++);
}

KvCache::KvCache(Backend& backend, const ModelConfig& config, int64_t full_pages, int64_t window_pages)
    : config_(config), page_bytes_(backend.page_bytes(config.n_kv_heads)), full_pool_(full_pages), window_pool_(window_pages) {
  for (int64_t window : config.layer_windows) {
    const int64_t n_pages = 1 + (window ? window_pages : full_pages);
    window_ = std::max(window_, window);
    ++(window ? n_window_layers_ : n_full_layers_);
    keys_.push_back(backend.allocate(n_pages * page_bytes_));
    values_.push_back(backend.allocate(n_pages * page_bytes_));
  }
}

KvLayer KvCache::layer(int64_t index) const {
  return {keys_[index].data(), values_[index].data(), config_.layer_windows[index]};
}

// The oldest page the token at position `length` can see through a window.
int64_t KvCache::first_window_page(int64_t length) const { return std::max<int64_t>(0, length - window_ + 1) / kPageTokens; }

void KvCache::extend(SequenceCache& sequence, int64_t n) {
  std::lock_guard lock(mutex_);
  const int64_t end_page = (sequence.length + n + kPageTokens - 1) / kPageTokens;
  const bool has_full = n_full_layers_ > 0, has_window = n_window_layers_ > 0;
  const int64_t full = has_full ? std::max<int64_t>(0, end_page - sequence.full.end_page()) : 0;
  const int64_t window = has_window ? std::max<int64_t>(0, end_page - sequence.window.end_page()) : 0;
  const auto check = [](const PagePool& pool, int64_t more, const char* layers) {
    if (!pool.can_take(more))
      FAIL("the cache is full: ", pool.in_use(), " of ", pool.capacity(), " pages of ", kPageTokens, " tokens of the ", layers,
           " layers are in use, and ", more, " more are needed");
  };
  check(full_pool_, full, "full");
  check(window_pool_, window, "window");
  for (int64_t i = 0; i < full; ++i) sequence.full.pages.push_back(full_pool_.take());
  for (int64_t i = 0; i < window; ++i) sequence.window.pages.push_back(window_pool_.take());
}

void KvCache::commit(SequenceCache& sequence, int64_t n) {
  std::lock_guard lock(mutex_);
  sequence.length += n;
  PageList& list = sequence.window;
  const int64_t drop = std::min<int64_t>(list.pages.size(), first_window_page(sequence.length) - list.first_page);
  if (drop <= 0) return;
  for (int64_t i = 0; i < drop; ++i) window_pool_.give_back(list.pages[i]);
  list.pages.erase(list.pages.begin(), list.pages.begin() + drop);
  list.first_page += drop;
}

void KvCache::give_back_from(PageList& list, PagePool& pool, int64_t end_page) {
  while (list.end_page() > end_page && !list.pages.empty()) {
    pool.give_back(list.pages.back());
    list.pages.pop_back();
  }
}

void KvCache::trim(SequenceCache& sequence) {
  std::lock_guard lock(mutex_);
  const int64_t end_page = (sequence.length + kPageTokens - 1) / kPageTokens;
  give_back_from(sequence.full, full_pool_, end_page);
  give_back_from(sequence.window, window_pool_, end_page);
}

void KvCache::truncate(SequenceCache& sequence, int64_t length) {
  CHECK(length >= 0 && length <= sequence.length, "cannot truncate a sequence of ", sequence.length, " tokens to ", length);
  CHECK(n_window_layers_ == 0 || length == 0 || first_window_page(length) >= sequence.window.first_page, "cannot truncate to ",
        length, " tokens: the window layers keep only what position ", sequence.length, " can see");
  if (length == 0) return release(sequence);
  sequence.length = length;
  trim(sequence);
}

void KvCache::release(SequenceCache& sequence) {
  std::lock_guard lock(mutex_);
  give_back_from(sequence.full, full_pool_, 0);
  give_back_from(sequence.window, window_pool_, 0);
  sequence = {};
}

int64_t KvCache::bytes_in_use() const {
  std::lock_guard lock(mutex_);
  return 2 * page_bytes_ * (full_pool_.in_use() * n_full_layers_ + window_pool_.in_use() * n_window_layers_);
}

}  // namespace gptoss
