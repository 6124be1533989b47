// See emulator/hopper.h.
#include "cuda/emulator/hopper.h"

#include <algorithm>
#include <vector>

#include "check.h"

namespace gptoss::emulator {
namespace {

constexpr uint32_t kSharedBase = 128;  // the address of the first byte of shared memory

unsigned char* shared_at(uint32_t address) { return shared_memory() + (address - kSharedBase); }

// 16-byte chunk i of the 8 in a line of 128 lies at chunk i ^ (line % 8): bits 4 to 6 of an address with bits 7 to 9.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// The 8 bytes of a barrier.
struct Barrier {
  uint64_t phase : 1, arrivals : 15, pending : 16;
  int64_t bytes : 32;
};
static_assert(sizeof(Barrier) == 8);

struct Box {
  uint32_t to, barrier;
  TensorMap map;
  int column, row;
};

struct Product {
  float* sums;
  int columns;
  const uint32_t* fragment;
  uint64_t operand_b;
  int group;
  std::vector<float> before;  // the sums, where this is the first product that will change them
};

struct Thread {
  std::vector<Product> products;
  int group = 0;  // that the next products belong to
  bool fenced = false;
  uint64_t history = 0;  // a hash of its products, which its whole warpgroup must share
};

struct State {
  std::vector<Box> boxes;  // on their way
  std::vector<Thread> threads;
  uint32_t changes = 0;  // phases that ended, boxes that were started: whoever waits looks again
};
State state;

Thread& self() { return state.threads[place.thread.x]; }

Barrier& barrier_at(uint32_t address) { return *reinterpret_cast<Barrier*>(shared_at(address)); }

void end_phase_if_done(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  barrier.phase ^= 1;
  ++state.changes;
}

void land(const Box& box) {
  for (int r = 0; r < box.map.box_rows; ++r) {
    const int64_t row = box.row + r;
    for (int c = 0; c < box.map.box_columns; ++c) {
      const int64_t column = box.column + c;
      const bool inside = row >= 0 && row < box.map.rows && column >= 0 && column < box.map.columns;
      const uint32_t to = swizzled(box.to + static_cast<uint32_t>(r * box.map.box_columns + c) * 2);
      if (inside)
        std::memcpy(shared_at(to), box.map.base + row * box.map.stride + column * 2, 2);
      else
        std::memset(shared_at(to), 0, 2);
    }
  }
  Barrier& barrier = barrier_at(box.barrier);
  barrier.bytes -= box.map.box_rows * box.map.box_columns * 2;
  end_phase_if_done(barrier);
}

// B [16, columns] of a descriptor (PTX ISA, "Matrix descriptor"), token by token.
void read_operand_b(float (*to)[16], uint64_t descriptor, int columns) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;  // from 8 tokens to the next 8
  for (int n = 0; n < columns; ++n) {
    for (int k = 0; k < 16; ++k) {
      uint16_t bits;
      std::memcpy(&bits, shared_at(swizzled(start + n / 8 * stride + n % 8 * 128 + k * 2)), 2);
      to[n][k] = __uint_as_float(static_cast<uint32_t>(bits) << 16);
    }
  }
}

// Product i of each lane of a warp.
void run_product(Thread* warp, size_t i) {
  static float A[16][16], B[256][16];
  const Product& first = warp->products[i];
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < 4; ++r) {
      const uint32_t pair = warp[lane].products[i].fragment[r];
      float* to = &A[lane / 4 + r % 2 * 8][lane % 4 * 2 + r / 2 * 8];
      to[0] = __uint_as_float(pair << 16), to[1] = __uint_as_float(pair & 0xffff0000u);
    }
  }
  read_operand_b(B, first.operand_b, first.columns);
  for (int lane = 0; lane < 32; ++lane) {
    Product& product = warp[lane].products[i];
    if (!product.before.empty()) std::copy(product.before.begin(), product.before.end(), product.sums);
    for (int s = 0; s < product.columns / 2; ++s) {
      const float *row = A[lane / 4 + s / 2 % 2 * 8], *column = B[s / 4 * 8 + lane % 4 * 2 + s % 2];
      float part[4] = {};
      for (int k = 0; k < 16; k += 4)
        for (int j = 0; j < 4; ++j) part[j] += row[k + j] * column[k + j];
      product.sums[s] += (part[0] + part[1]) + (part[2] + part[3]);
    }
  }
}

// Takes the sums away until the product has run.
void hide_sums(Product& product) {
  product.before.assign(product.sums, product.sums + product.columns / 2);
  std::fill_n(product.sums, product.columns / 2, __uint_as_float(0x7fffffffu));
}

}  // namespace

void begin_hopper_block(int threads) {
  state = State{};
  state.threads.resize(threads);
}

const char* end_hopper_block() {
  if (!state.boxes.empty()) return "a copy that nobody waits for";
  for (size_t i = 0; i < state.threads.size(); ++i) {
    if (!state.threads[i].products.empty()) return "a product of a warpgroup that nobody waits for";
    if (state.threads[i].history != state.threads[i / 128 * 128].history) return "warps of a warpgroup with different products";
  }
  return nullptr;
}

TensorMap make_tensor_map(const uint16_t* matrix, int64_t rows, int64_t columns, int box_rows, int box_columns) {
  CHECK(reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && columns % 8 == 0, "emulator: a tensor map of rows at ", matrix, ", ",
        columns, " elements apart");
  CHECK(rows > 0 && box_rows > 0 && box_rows <= 256 && box_columns == 64, "emulator: a tensor map of ", rows,
        " rows, boxes of ", box_rows, " x ", box_columns);
  return {reinterpret_cast<const unsigned char*>(matrix), rows, columns, columns * 2, box_rows, box_columns};
}

uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - shared_memory()) + kSharedBase;
}

void init_barrier(uint32_t barrier, int arrivals) {
  barrier_at(barrier) = {0, static_cast<uint64_t>(arrivals), static_cast<uint64_t>(arrivals), 0};
}

void arrive(uint32_t barrier, int expected_bytes) {
  Barrier& to = barrier_at(barrier);
  if (to.pending == 0) stop_block("a barrier with more arrivals than it counts");
  to.bytes += expected_bytes;
  --to.pending;
  end_phase_if_done(to);
}

void wait_phase(uint32_t barrier, uint32_t parity) {
  while (barrier_at(barrier).phase == parity) {
    const uint32_t seen = state.changes;
    std::erase_if(state.boxes, [&](const Box& box) {
      if (box.barrier != barrier) return false;
      land(box);
      return true;
    });
    if (state.changes == seen) wait_for_change(state.changes);
  }
}

void load_box(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier) {
  if (to % 1024 != 0) stop_block("a box to an address that is not a multiple of 1024");
  state.boxes.push_back({to, barrier, map, column, row});
  ++state.changes;
}

void wgmma_fence() { self().fenced = true; }

void wgmma(float* sums, int columns, const uint32_t* fragment, uint64_t operand_b) {
  Thread& thread = self();
  if (!thread.fenced) stop_block("a product of a warpgroup without a fence");
  const auto stride = operand_b >> 32 & 0x3fff, offset = operand_b >> 49 & 7, swizzle = operand_b >> 62;
  if (swizzle != 1 || offset != 0 || stride != 1024 >> 4) stop_block("an operand B that is not 128-byte swizzled tokens");
  thread.history = (thread.history + operand_b + static_cast<uint64_t>(columns)) * 0x9e3779b97f4a7c15u;
  const bool first =
      std::none_of(thread.products.begin(), thread.products.end(), [&](const Product& p) { return p.sums == sums; });
  thread.products.push_back({sums, columns, fragment, operand_b, thread.group, {}});
  if (first) hide_sums(thread.products.back());
}

void wgmma_commit() {
  ++self().group;
  self().fenced = false;
}

void wgmma_wait(int groups_left) {
  struct Wait {
    Thread* thread;
    int groups_left;
  } mine{&self(), groups_left};
  collective(&mine, [](void* const* lanes) {
    const Wait& lane = *static_cast<Wait*>(lanes[0]);
    Thread* warp = lane.thread;
    size_t n = 0;
    while (n < warp->products.size() && warp->products[n].group < warp->group - lane.groups_left) run_product(warp, n++);
    for (int i = 0; i < 32; ++i) {
      std::vector<Product>& products = warp[i].products;
      for (size_t p = n; p < products.size() && n > 0; ++p) {
        const auto same = [&](const Product& other) { return other.sums == products[p].sums; };
        const auto mine = products.begin() + static_cast<int64_t>(p), left = products.begin() + static_cast<int64_t>(n);
        if (std::any_of(products.begin(), left, same) && std::none_of(left, mine, same)) hide_sums(products[p]);
      }
      products.erase(products.begin(), products.begin() + static_cast<int64_t>(n));
    }
  });
}

}  // namespace gptoss::emulator
