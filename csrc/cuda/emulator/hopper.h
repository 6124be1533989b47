// The emulator's part for what only sm_90a has: barriers in shared memory (mbarrier), copies of boxes (cp.async.bulk.tensor)
// and products of warpgroups (wgmma), each by its description in the PTX ISA. Shared memory is named by address, as there; it
// begins at an address that is a multiple of 128 and of nothing more, which is all that a kernel may count on.
//
// Everything that runs by itself on the card happens as late as it may: a box lands when somebody waits for its barrier, a
// group of products runs when it is waited for, with the fragments and the shared memory of that moment; until then its sums
// are NaN. So a result that is read, a fragment that is written or a stage that is filled too early shows. Errors are:
//   - a stage that is not a multiple of 1024 bytes, a descriptor that is not of 128-byte swizzled tokens;
//   - products without a fence in their group; products or copies that nobody waits for; warps of a warpgroup whose
//     products differ;
//   - a barrier with more arrivals than it counts.
#pragma once
#include <cstdint>

#include "cuda/emulator/emulator.h"

#define __grid_constant__

namespace gptoss::emulator {

// What cuTensorMapEncodeTiled makes of a matrix of two-byte elements, with 128-byte swizzle and zeros outside.
struct TensorMap {
  const unsigned char* base;
  int64_t rows, columns, stride;  // stride: bytes
  int box_rows, box_columns;
};
TensorMap make_tensor_map(const uint16_t* matrix, int64_t rows, int64_t columns, int box_rows, int box_columns);

uint32_t shared_address(const void* shared);

void init_barrier(uint32_t barrier, int arrivals);
void arrive(uint32_t barrier, int expected_bytes);
void wait_phase(uint32_t barrier, uint32_t parity);
void load_box(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier);

void wgmma_fence();
void wgmma(float* sums, int columns, const uint32_t* fragment, uint64_t operand_b);  // sums: [columns / 2]   fragment: [4]
void wgmma_commit();
void wgmma_wait(int groups_left);

// For the scheduler.
void begin_hopper_block(int threads);
const char* end_hopper_block();  // what is wrong, or null

}  // namespace gptoss::emulator
