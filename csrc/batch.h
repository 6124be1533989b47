// A ragged batch: the new tokens of several sequences, one after the other, as one step of the model takes them.
// A prompt chunk of one sequence and single tokens of thirty others go through the same call.
#pragma once
#include <cstdint>
#include <vector>

namespace gptoss {

inline constexpr int64_t kPageTokens = 128;
// A page of every pool that is nobody's: rows that fill up a batch write there.
inline constexpr int32_t kScratchPage = 0;

// Which cache pages hold a sequence's keys and values, in one pool. Page i covers positions [128 i, 128 (i+1)); pages
// below first_page are gone (outside every window).
struct PageList {
  int64_t first_page = 0;
  std::vector<int32_t> pages;

  int32_t page_of(int64_t position) const { return pages[position / kPageTokens - first_page]; }
  int64_t end_page() const { return first_page + static_cast<int64_t>(pages.size()); }
};

struct BatchSequence {
  int64_t first_row = 0;  // its rows of the batch are first_row .. first_row + n_rows
  int64_t n_rows = 0;
  int64_t position = 0;                    // of its first row
  const PageList* full_pages = nullptr;    // for layers that see everything
  const PageList* window_pages = nullptr;  // for window layers
};

struct Batch {
  std::vector<int32_t> tokens;       // [n] ids
  std::vector<int32_t> positions;    // [n] in their sequences
  std::vector<int32_t> sequence_of;  // [n] index into sequences
  std::vector<BatchSequence> sequences;

  int64_t n_tokens() const { return static_cast<int64_t>(tokens.size()); }
  // Whether every sequence has one row.
  bool is_decode() const { return !sequences.empty() && sequences.size() == tokens.size(); }
};

enum class StepEnd { kLayers, kLogits, kSamples };  // the last that a step's operations give

}  // namespace gptoss
