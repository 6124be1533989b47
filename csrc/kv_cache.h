// The key/value cache: pages of 128 tokens from two pools, one for layers that see everything and one for window layers, whose
// pages go back as soon as the window has passed them. A page number stands for that page in every layer of its kind.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "backend.h"

namespace gptoss {

// Free page numbers: the ones given back last are taken first, so that memory once touched is used again. They begin after
// kScratchPage, which is never given out.
class PagePool {
 public:
  explicit PagePool(int64_t capacity) : capacity_(capacity) {}
  int64_t in_use() const { return next_ - 1 - static_cast<int64_t>(free_.size()); }
  bool can_take(int64_t n) const { return in_use() + n <= capacity_; }
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
};

class KvCache {
 public:
  // Pages of the two pools, without the scratch page that each has besides.
  KvCache(Backend& backend, const ModelConfig& config, int64_t full_pages, int64_t window_pages);

  KvLayer layer(int64_t index) const;

  // Takes the pages for n more tokens, or throws and changes nothing.
  void extend(SequenceCache& sequence, int64_t n);
  // The n tokens are there: they count from now on, and window pages no later token can see go back.
  void commit(SequenceCache& sequence, int64_t n);
  // Gives back the pages past the sequence's length (after a step that failed).
  void trim(SequenceCache& sequence);
  // Forgets tokens from `length` on. Throws if the window layers have already let go of what the new end must see.
  void truncate(SequenceCache& sequence, int64_t length);
  void release(SequenceCache& sequence);

  int64_t bytes_in_use() const;

 private:
  void give_back_from(PageList& list, PagePool& pool, int64_t end_page);
  int64_t first_window_page(int64_t length) const;

  ModelConfig config_;
  int64_t page_bytes_;
  int64_t window_ = 0;  // the widest
  int64_t n_full_layers_ = 0, n_window_layers_ = 0;
  std::vector<Buffer> keys_, values_;  // [layer]
  mutable std::mutex mutex_;           // sequences are released from any thread
  PagePool full_pool_, window_pool_;
};

}  // namespace gptoss
