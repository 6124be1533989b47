// The key/value cache: pages of 128 tokens from two pools, one for layers that see everything and one for window layers, whose
// pages go back as soon as the window has passed them. A page number stands for that page in every layer of its kind.
//
// With a prefix cache a page that is full belongs to it (prefix_cache.h) and is never written again; sequences share it. It
// stays when they go, until pages run short.
#pragma once
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "backend.h"
#include "prefix_cache.h"

namespace gptoss {

// Free page numbers: the ones given back last are taken first, so that memory once touched is used again. They begin after
// kScratchPage, which is never given out.
class PagePool {
 public:
  explicit PagePool(int64_t capacity) : capacity_(capacity) {}
  int64_t in_use() const { return next_ - 1 - static_cast<int64_t>(free_.size()); }
  int64_t left() const { return capacity_ - in_use(); }
  int64_t capacity() const { return capacity_; }
  int32_t take();
  void give_back(int32_t page) { free_.push_back(page); }

 private:
  int64_t capacity_;
  int64_t next_ = kScratchPage + 1;  // pages never taken yet start here
  std::vector<int32_t> free_;
};

// What one sequence holds of the cache.
struct SequenceCache {
  int64_t length = 0;  // tokens whose keys and values are in the cache
  PageList full;
  PageList window;
  // With a prefix cache: the entry of the last page that is full, and the tokens behind it.
  PrefixEntry* prefix = nullptr;
  std::vector<int32_t> tail;

  int64_t n_shared() const { return prefix ? prefix->depth : 0; }  // pages that are the prefix cache's
};

struct CacheStats {
  int64_t full_in_use = 0, window_in_use = 0;  // pages that sequences hold
  int64_t cached_pages = 0;                    // that the prefix cache knows, held or not
  int64_t prefix_tokens_asked = 0, prefix_tokens_reused = 0;
};

// Pages do not suffice.
class CacheFull : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class KvCache {
 public:
  // Pages of the two pools, without the scratch page that each has besides. cached_pages: the most of either that the prefix
  // cache keeps which no sequence holds; -1: there is no prefix cache.
  KvCache(Backend& backend, const ModelConfig& config, int64_t full_pages, int64_t window_pages, int64_t cached_pages = -1);

  KvLayer layer(int64_t index) const;

  // Takes the pages for n more tokens, or throws CacheFull and changes nothing.
  void extend(SequenceCache& sequence, int64_t n);
  // The n tokens are there: they count from now on, and window pages no later token can see go back.
  //                                                                            tokens: [n], for the prefix cache alone
  void commit(SequenceCache& sequence, int64_t n, const int32_t* tokens = nullptr);
  // Gives an empty sequence the pages of the longest beginning of the tokens that the prefix cache holds: whole pages, and not
  // the last token. Returns how many tokens that are.                                                       tokens: [n]
  int64_t reuse(SequenceCache& sequence, const int32_t* tokens, int64_t n);
  // Gives back the pages past the sequence's length (after a step that failed).
  void trim(SequenceCache& sequence);
  // Forgets tokens from `length` on. Throws if the window layers have already let go of what the new end must see, or if it is
  // inside a page that is the prefix cache's: those are not written again.
  void truncate(SequenceCache& sequence, int64_t length);
  void release(SequenceCache& sequence);

  // Of pages that sequences or the prefix cache hold.
  int64_t bytes_in_use() const;
  int64_t full_pages() const { return full_pool_.capacity(); }
  int64_t window_pages() const { return window_pool_.capacity(); }
  // Of each pool, what sequences may still take: pages that only the prefix cache holds are among them.
  std::pair<int64_t, int64_t> free_pages() const;
  CacheStats stats() const;

 private:
  int64_t free_full() const { return full_pool_.left() + (n_full_layers_ ? prefix_.idle() : 0); }
  int64_t free_window() const { return window_pool_.left() + prefix_.idle_windows(); }
  void evict();
  void evict_surplus();
  void give_back_own(SequenceCache& sequence, int64_t end_page);
  void give_back_from(PageList& list, PagePool& pool, int64_t end_page);
  void share_page(SequenceCache& sequence, const int32_t* tokens);
  void unshare(SequenceCache& sequence, int64_t n_pages);
  bool has_windows(const PrefixEntry* entry) const;
  int64_t first_window_page(int64_t length) const;

  ModelConfig config_;
  int64_t page_bytes_;
  int64_t window_ = 0;  // the widest
  int64_t n_full_layers_ = 0, n_window_layers_ = 0;
  std::vector<Buffer> keys_, values_;  // [layer]
  mutable std::mutex mutex_;           // read from any thread
  PagePool full_pool_, window_pool_;
  int64_t most_cached_;  // -1: no prefix cache
  PrefixCache prefix_;
  int64_t tokens_asked_ = 0, tokens_reused_ = 0;
};

}  // namespace gptoss
