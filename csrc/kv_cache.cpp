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

KvCache::KvCache(Backend& backend, const ModelConfig& config, int64_t full_pages, int64_t window_pages, int64_t cached_pages)
    : config_(config),
      page_bytes_(backend.page_bytes(config.n_kv_heads)),
      full_pool_(full_pages),
      window_pool_(window_pages),
      most_cached_(cached_pages) {
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
  const auto check = [](const PagePool& pool, int64_t free, int64_t more, const char* layers) {
    if (more > free)
      throw CacheFull(join("the cache is full: ", pool.capacity() - free, " of ", pool.capacity(), " pages of ", kPageTokens,
                           " tokens of the ", layers, " layers are in use, and ", more, " more are needed"));
  };
  check(full_pool_, free_full(), full, "full");
  check(window_pool_, free_window(), window, "window");
  while (full_pool_.left() < full) evict();
  while (window_pool_.left() < window) window_pool_.give_back(prefix_.evict_window());
  for (int64_t i = 0; i < full; ++i) sequence.full.pages.push_back(full_pool_.take());
  for (int64_t i = 0; i < window; ++i) sequence.window.pages.push_back(window_pool_.take());
}

void KvCache::evict() {
  const PrefixCache::Pages pages = prefix_.evict();
  if (pages.full != kNoPage) full_pool_.give_back(pages.full);
  if (pages.window != kNoPage) window_pool_.give_back(pages.window);
}

// Down to what the prefix cache may keep for nobody.
void KvCache::evict_surplus() {
  if (most_cached_ < 0) return;
  while (prefix_.idle() > most_cached_) evict();
  while (prefix_.idle_windows() > most_cached_) window_pool_.give_back(prefix_.evict_window());
}

void KvCache::commit(SequenceCache& sequence, int64_t n, const int32_t* tokens) {
  std::lock_guard lock(mutex_);
  sequence.length += n;
  if (most_cached_ >= 0) {
    std::vector<int32_t>& tail = sequence.tail;
    tail.insert(tail.end(), tokens, tokens + n);
    const int64_t shared = sequence.n_shared(), whole = std::ssize(tail) / kPageTokens;
    while (sequence.n_shared() < shared + whole)
      share_page(sequence, tail.data() + (sequence.n_shared() - shared) * kPageTokens);
    tail.erase(tail.begin(), tail.begin() + whole * kPageTokens);
  }
  PageList& list = sequence.window;
  const int64_t drop = std::min<int64_t>(list.pages.size(), first_window_page(sequence.length) - list.first_page);
  if (drop <= 0) return;
  PrefixEntry* entry = sequence.prefix;
  for (int64_t i = drop - 1; i >= 0; --i) {
    while (entry && entry->depth > list.first_page + i + 1) entry = entry->parent;
    if (entry && entry->depth == list.first_page + i + 1)
      prefix_.release_window(entry);
    else
      window_pool_.give_back(list.pages[i]);
  }
  list.pages.erase(list.pages.begin(), list.pages.begin() + drop);
  list.first_page += drop;
  evict_surplus();
}

// The sequence's first page that is not shared yet is full: it becomes the prefix cache's. Where that has these tokens already,
// its page takes the place of the sequence's, which holds the same.
void KvCache::share_page(SequenceCache& sequence, const int32_t* tokens) {
  const int64_t page = sequence.n_shared();
  PrefixEntry* entry = sequence.prefix = prefix_.hold_next(sequence.prefix, tokens);
  const auto share = [page](int32_t& shared, PageList& list, PagePool& pool) {
    int32_t& own = list.pages[page - list.first_page];
    const bool is_new = shared == kNoPage;
    if (is_new) return shared = own, is_new;
    pool.give_back(own);
    own = shared;
    return is_new;
  };
  if (n_full_layers_ > 0) share(entry->full_page, sequence.full, full_pool_);
  if (n_window_layers_ == 0 || page < sequence.window.first_page) return;
  if (share(entry->window_page, sequence.window, window_pool_))
    entry->window_holders = 1;
  else
    prefix_.hold_window(entry);
}

// Whether a sequence may go on behind the entry: the window layers have what its next token sees.
bool KvCache::has_windows(const PrefixEntry* entry) const {
  if (n_window_layers_ == 0) return true;
  const int64_t first = first_window_page(entry->depth * kPageTokens);
  for (; entry && entry->depth > first; entry = entry->parent)
    if (entry->window_page == kNoPage) return false;
  return true;
}

int64_t KvCache::reuse(SequenceCache& sequence, const int32_t* tokens, int64_t n) {
  CHECK(sequence.length == 0, "only an empty sequence can reuse what the cache holds, not one of ", sequence.length, " tokens");
  if (most_cached_ < 0) return 0;
  std::lock_guard lock(mutex_);
  tokens_asked_ += n;
  PrefixEntry* end = nullptr;
  for (int64_t page = 0; (page + 1) * kPageTokens < n; ++page) {
    PrefixEntry* next = prefix_.find(end, tokens + page * kPageTokens);
    if (!next) break;
    end = next;
  }
  while (end && !has_windows(end)) end = end->parent;
  if (!end) return 0;
  const int64_t length = end->depth * kPageTokens;
  if (n_full_layers_ > 0) sequence.full.pages.resize(end->depth);
  if (n_window_layers_ > 0) {
    sequence.window.first_page = first_window_page(length);
    sequence.window.pages.resize(end->depth - sequence.window.first_page);
  }
  for (PrefixEntry* entry = end; entry; entry = entry->parent) {
    const int64_t page = entry->depth - 1;
    prefix_.hold(entry);
    if (n_full_layers_ > 0) sequence.full.pages[page] = entry->full_page;
    if (n_window_layers_ == 0 || page < sequence.window.first_page) continue;
    prefix_.hold_window(entry);
    sequence.window.pages[page - sequence.window.first_page] = entry->window_page;
  }
  sequence.prefix = end;
  sequence.length = length;
  tokens_reused_ += length;
  return length;
}

void KvCache::give_back_from(PageList& list, PagePool& pool, int64_t end_page) {
  while (list.end_page() > end_page && !list.pages.empty()) {
    pool.give_back(list.pages.back());
    list.pages.pop_back();
  }
}

// Pages from end_page on, which are the sequence's own.
void KvCache::give_back_own(SequenceCache& sequence, int64_t end_page) {
  give_back_from(sequence.full, full_pool_, end_page);
  give_back_from(sequence.window, window_pool_, end_page);
}

// Lets go of the shared pages behind the first n_pages; the sequence has none of its own behind them.
void KvCache::unshare(SequenceCache& sequence, int64_t n_pages) {
  while (sequence.n_shared() > n_pages) {
    PrefixEntry* entry = sequence.prefix;
    if (n_full_layers_ > 0) sequence.full.pages.pop_back();
    if (!sequence.window.pages.empty()) {
      sequence.window.pages.pop_back();
      prefix_.release_window(entry);
    }
    sequence.prefix = prefix_.release(entry);
  }
  evict_surplus();
}

void KvCache::trim(SequenceCache& sequence) {
  std::lock_guard lock(mutex_);
  give_back_own(sequence, (sequence.length + kPageTokens - 1) / kPageTokens);
}

void KvCache::truncate(SequenceCache& sequence, int64_t length) {
  CHECK(length >= 0 && length <= sequence.length, "cannot truncate a sequence of ", sequence.length, " tokens to ", length);
  if (length == 0) return release(sequence);
  CHECK(n_window_layers_ == 0 || first_window_page(length) >= sequence.window.first_page, "cannot truncate to ", length,
        " tokens: the window layers keep only what position ", sequence.length, " can see");
  const int64_t shared = sequence.n_shared(), keep = std::min(shared, length / kPageTokens);
  CHECK(length >= shared * kPageTokens || length % kPageTokens == 0, "cannot truncate to ", length,
        " tokens: that is inside a page which the prefix cache shares; only a multiple of ", kPageTokens,
        " can be returned to");
  std::lock_guard lock(mutex_);
  give_back_own(sequence, std::max(shared, (length + kPageTokens - 1) / kPageTokens));
  unshare(sequence, keep);
  sequence.length = length;
  if (most_cached_ >= 0) sequence.tail.resize(length - keep * kPageTokens);
}

void KvCache::release(SequenceCache& sequence) {
  std::lock_guard lock(mutex_);
  give_back_own(sequence, sequence.n_shared());
  unshare(sequence, 0);
  sequence = {};
}

int64_t KvCache::bytes_in_use() const {
  std::lock_guard lock(mutex_);
  return 2 * page_bytes_ * (full_pool_.in_use() * n_full_layers_ + window_pool_.in_use() * n_window_layers_);
}

std::pair<int64_t, int64_t> KvCache::free_pages() const {
  std::lock_guard lock(mutex_);
  return {free_full(), free_window()};
}

CacheStats KvCache::stats() const {
  std::lock_guard lock(mutex_);
  return {full_pages() - free_full(), window_pages() - free_window(), prefix_.size(), tokens_asked_, tokens_reused_};
}

}  // namespace gptoss
