// Which cache pages hold which tokens, so that a sequence that begins like an earlier one takes that one's pages.
//
// A tree: an entry is one page of tokens behind those of its parents. What it is found by are the tokens themselves, so a wrong
// match cannot be. A sequence holds the entries of its full pages, all of them from the first; an entry that nobody holds may
// go, least recently held first and never before those behind it. Its window page may go alone, and sooner: it is needed only
// where a sequence goes on right behind it.
//
// Nothing here knows the pools: pages that come out of an entry are the caller's to give back.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <utility>

#include "batch.h"

namespace gptoss {

inline constexpr int32_t kNoPage = -1;

using PageTokens = std::array<int32_t, kPageTokens>;

struct PrefixEntry {
  PrefixEntry* parent = nullptr;  // null: the first page of a sequence
  int64_t depth = 0;              // pages up to this one, itself included
  int32_t full_page = kNoPage;    // of the layers that see everything, if there are any
  int32_t window_page = kNoPage;  // of the window layers, while it is kept
  int64_t holders = 0;            // sequences that hold it: theirs goes through it
  int64_t window_holders = 0;     // sequences in whose window it is

 private:
  friend class PrefixCache;
  const std::pair<uint64_t, PageTokens>* key = nullptr;  // the parent's id (0: none), the tokens
  uint64_t id = 0;                                       // of all entries ever made
  int64_t n_children = 0;
  uint64_t released = 0, window_released = 0;  // when the last holder let go
};

class PrefixCache {
 public:
  // The entry of these 128 tokens behind `parent` (null: at the start), or null.
  PrefixEntry* find(const PrefixEntry* parent, const int32_t* tokens);  // tokens: [128]
  // The same, made without pages if there is none; held once more.
  PrefixEntry* hold_next(PrefixEntry* parent, const int32_t* tokens);
  void hold(PrefixEntry* entry);
  // Returns the parent. An entry is let go before its parents.
  PrefixEntry* release(PrefixEntry* entry);

  void hold_window(PrefixEntry* entry);
  void release_window(PrefixEntry* entry);

  struct Pages {
    int32_t full = kNoPage, window = kNoPage;
  };
  // The last-of-its-branch entry that has been without a holder for longest goes; there must be one (idle() > 0).
  Pages evict();
  // The window page that has been without a holder for longest; there must be one (idle_windows() > 0).
  int32_t evict_window();

  int64_t size() const { return static_cast<int64_t>(entries_.size()); }
  int64_t idle() const { return idle_; }  // entries that nobody holds
  int64_t idle_windows() const { return static_cast<int64_t>(idle_windows_.size()); }

 private:
  using Key = std::pair<uint64_t, PageTokens>;
  static Key key_of(const PrefixEntry* parent, const int32_t* tokens);
  void remove(PrefixEntry* entry);
  void remove_empty(PrefixEntry* entry);

  std::map<Key, PrefixEntry> entries_;
  std::map<uint64_t, PrefixEntry*> idle_ends_;     // [released] without children or holders
  std::map<uint64_t, PrefixEntry*> idle_windows_;  // [window_released]
  int64_t idle_ = 0;
  uint64_t clock_ = 0, last_id_ = 0;
};

}  // namespace gptoss
