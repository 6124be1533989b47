#include "prefix_cache.h"

#include <algorithm>

namespace gptoss {

PrefixCache::Key PrefixCache::key_of(const PrefixEntry* parent, const int32_t* tokens) {
  Key key{parent ? parent->id : 0, {}};
  std::copy_n(tokens, kPageTokens, key.second.begin());
  return key;
}

PrefixEntry* PrefixCache::find(const PrefixEntry* parent, const int32_t* tokens) {
  const auto found = entries_.find(key_of(parent, tokens));
  return found == entries_.end() ? nullptr : &found->second;
}

PrefixEntry* PrefixCache::hold_next(PrefixEntry* parent, const int32_t* tokens) {
  const auto [place, is_new] = entries_.try_emplace(key_of(parent, tokens));
  PrefixEntry* entry = &place->second;
  if (!is_new) {
    hold(entry);
    return entry;
  }
  entry->parent = parent;
  entry->depth = parent ? parent->depth + 1 : 1;
  entry->holders = 1;
  entry->key = &place->first;
  entry->id = ++last_id_;
  if (parent) ++parent->n_children;
  return entry;
}

void PrefixCache::hold(PrefixEntry* entry) {
  if (entry->holders++ > 0) return;
  --idle_;
  if (entry->n_children == 0) idle_ends_.erase(entry->released);
}

PrefixEntry* PrefixCache::release(PrefixEntry* entry) {
  PrefixEntry* parent = entry->parent;
  if (--entry->holders > 0) return parent;
  ++idle_;
  entry->released = ++clock_;
  if (entry->n_children == 0) idle_ends_.emplace(entry->released, entry);
  remove_empty(entry);
  return parent;
}

void PrefixCache::hold_window(PrefixEntry* entry) {
  if (entry->window_holders++ == 0) idle_windows_.erase(entry->window_released);
}

void PrefixCache::release_window(PrefixEntry* entry) {
  if (--entry->window_holders > 0) return;
  entry->window_released = ++clock_;
  idle_windows_.emplace(entry->window_released, entry);
}

PrefixCache::Pages PrefixCache::evict() {
  PrefixEntry* entry = idle_ends_.begin()->second;
  const Pages pages = {entry->full_page, entry->window_page};
  if (entry->window_page != kNoPage) idle_windows_.erase(entry->window_released);
  remove(entry);
  return pages;
}

int32_t PrefixCache::evict_window() {
  const auto oldest = idle_windows_.begin();
  PrefixEntry* entry = oldest->second;
  const int32_t page = std::exchange(entry->window_page, kNoPage);
  idle_windows_.erase(oldest);
  remove_empty(entry);
  return page;
}

// An entry without children or holders.
void PrefixCache::remove(PrefixEntry* entry) {
  PrefixEntry* parent = entry->parent;
  idle_ends_.erase(entry->released);
  --idle_;
  entries_.erase(entries_.find(*entry->key));
  if (parent && --parent->n_children == 0 && parent->holders == 0) idle_ends_.emplace(parent->released, parent);
}

// In a model of window layers alone an entry may be left without pages: then it leads nowhere, once it is the last.
void PrefixCache::remove_empty(PrefixEntry* entry) {
  while (entry && entry->holders == 0 && entry->n_children == 0 && entry->full_page == kNoPage &&
         entry->window_page == kNoPage) {
    PrefixEntry* parent = entry->parent;
    remove(entry);
    entry = parent;
  }
}

}  // namespace gptoss
