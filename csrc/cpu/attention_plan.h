// How attention is divided among threads.
//
// A unit of work is a row of the batch, one of its key/value heads and a part of the chunks of keys that the row sees. The
// parts of a row are as alike in size as can be, and have at most kMostChunks chunks or, where that is more, what each unit
// would have if all chunks of all rows were dealt out evenly, kPartsPerThread units to a thread. So rows are cut where there
// are too few for the threads, or where one is much longer than the others. Never cut are rows of 512 keys or fewer (those of
// window layers among them), many rows alike, and anything for one thread.
//
// A part of several leaves the state of each of its chunks. When all are there, they are joined in the order in which attention
// in one piece does it: how a row is cut changes no bit.
#pragma once
#include <cstdint>
#include <vector>

#include "batch.h"

namespace gptoss::cpu {

inline constexpr int64_t kPartsPerThread = 4;  // so that a slow thread can take fewer
inline constexpr int64_t kMostChunks = 2;      // parts of 2 cost nothing that could be measured; parts of 1, 3 to 5%

struct AttentionRow {
  int64_t first_key = 0, end_key = 0;     // what it sees
  int64_t first_chunk = 0, n_chunks = 0;  // where that lies
  int64_t parts = 1;
  int64_t first_unit = 0;   // its units: [kv_heads][parts]
  int64_t first_state = 0;  // if parts > 1: chunks before it whose states are kept
};

struct AttentionUnit {
  int64_t row, kv_head, part;
};

class AttentionPlan {
 public:
  // The most chunks of one query head whose states are ever kept at once, for rows of up to `context` keys: fewer rows than
  // threads * kPartsPerThread / kv_heads are longer than one part.
  static int64_t most_states(int64_t max_rows, int64_t context, int64_t kv_heads, int64_t threads);

  void reserve(int64_t max_rows);
  // Of rows at these positions, each of which sees the last `window` keys up to its own (0: all).       positions: [n_rows]
  void make(const int32_t* positions, int64_t n_rows, int64_t window, int64_t kv_heads, int64_t threads);

  const std::vector<AttentionRow>& rows() const { return rows_; }
  const std::vector<int32_t>& cut_rows() const { return cut_rows_; }  // those of several parts
  int64_t n_units() const { return n_units_; }
  int64_t n_states() const { return n_states_; }  // chunks of one query head whose states are kept
  AttentionUnit unit(int64_t i) const;

 private:
  std::vector<AttentionRow> rows_;
  std::vector<int32_t> cut_rows_;
  int64_t n_units_ = 0, n_states_ = 0;
};

}  // namespace gptoss::cpu
