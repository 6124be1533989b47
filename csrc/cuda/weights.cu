// Weights as the matrix kernels want them: blocks of 16 rows x 64 inputs in which a lane's fragment is whole 16-byte loads.
// Lane 4g + c owns rows g and g + 8 and, of each 32 inputs, 8c .. 8c+7 (common.cuh).
//   bfloat16, 2048 bytes: [32 inputs: 2][row g or g + 8: 2][lane][8 weights]
//   MXFP4, 512 bytes: [lane][32 inputs: 2][row g or g + 8: 2] words of 8 codes; and 32 bytes of scales:
//     [g][row g or g + 8: 2][32 inputs: 2]
// A word of codes holds even weights in its low half and odd ones in its high half, each half alike: of weight pair p the
// exponent and mantissa at bits 6..8, 3..5, 0..2, 9..11 and the sign at 15, 12, 14, 13. A pair then comes out as two
// bfloat16 times 2^-126 with a mask and a shift or two (matmul.cu).
// A matrix of gates and ups takes 8 gates as rows 0..7 of a block and their ups as rows 8..15, so that one lane has both; one
// whose outputs are rotated, 8 elements of a head and those 32 further (source_row in kernels.h).
// Rows past the end and inputs past the end are 0.
#include "cuda/kernels.h"

namespace gptoss::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void arrange_bf16_kernel(uint4* out, const uint16_t* source, int64_t n, int64_t cols, RowOrder order,
                                    int64_t vectors) {
  wait_for_previous();
  const int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (v >= vectors) return;
  const int lane = static_cast<int>(v % 32), half = static_cast<int>(v / 32 % 2);
  const int64_t blocks = round_up(cols, 64) / 32, block = v / 64 % blocks, tile = v / 64 / blocks;
  const int64_t row = source_row(order, static_cast<int>(tile), half * 8 + lane / 4), col = block * 32 + lane % 4 * 8;
  uint4 value = {0, 0, 0, 0};
  if (row < n && col < cols) value = *reinterpret_cast<const uint4*>(source + row * cols + col);
  out[v] = value;
}

// 8 codes, the first in the low nibble, to the arrangement above.
__device__ uint32_t scatter_codes(uint32_t codes) {
  const int value_bit[] = {6, 3, 0, 9}, sign_bit[] = {15, 12, 14, 13};
  uint32_t word = 0;
  for (int i = 0; i < 8; ++i) {
    const uint32_t code = codes >> 4 * i & 15;
    word |= ((code & 7) << value_bit[i / 2] | (code >> 3) << sign_bit[i / 2]) << (i % 2 * 16);
  }
  return word;
}

__global__ void arrange_mxfp4_kernel(uint32_t* out, const uint8_t* source, int64_t n, int64_t cols, RowOrder order,
                                     int64_t words) {
  wait_for_previous();
  const int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (v >= words) return;
  const int half = static_cast<int>(v % 2), block = static_cast<int>(v / 2 % 2), lane = static_cast<int>(v / 4 % 32);
  const int64_t groups = ceil_div(cols, 64), group = v / 128 % groups, tile = v / 128 / groups;
  const int64_t row = source_row(order, static_cast<int>(tile), half * 8 + lane / 4),
                col = group * 64 + block * 32 + lane % 4 * 8;
  uint32_t word = 0;
  if (row < n && col < cols) word = scatter_codes(*reinterpret_cast<const uint32_t*>(source + (row * cols + col) / 2));
  out[v] = word;
}

__global__ void arrange_scales_kernel(uint8_t* out, const uint8_t* source, int64_t n, int64_t cols, RowOrder order,
                                      int64_t bytes) {
  wait_for_previous();
  const int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (v >= bytes) return;
  const int block = static_cast<int>(v % 2), half = static_cast<int>(v / 2 % 2), g = static_cast<int>(v / 4 % 8);
  const int64_t groups = ceil_div(cols, 64), group = v / 32 % groups, tile = v / 32 / groups;
  const int64_t row = source_row(order, static_cast<int>(tile), half * 8 + g), col = group * 2 + block;
  out[v] = row < n && col < cols / 32 ? source[row * (cols / 32) + col] : 0;
}

Launch flat(int64_t n, cudaStream_t stream) {
  return {dim3(static_cast<unsigned>(ceil_div(n, kThreads))), dim3(kThreads), 0, stream};
}

}  // namespace

int64_t arranged_scales_offset(int64_t experts, int64_t rows, int64_t cols) {
  return experts * ceil_div(rows, 16) * ceil_div(cols, 64) * 512;
}

int64_t arranged_bytes(bool mxfp4, int64_t experts, int64_t rows, int64_t cols) {
  return experts * ceil_div(rows, 16) * ceil_div(cols, 64) * (mxfp4 ? 512 + 32 : 2048);
}

void arrange_bf16(uint8_t* codes, const uint16_t* source, int64_t first_row, int64_t n, int64_t cols, RowOrder order,
                  cudaStream_t stream) {
  const int64_t vectors = ceil_div(n, 16) * ceil_div(cols, 64) * 128;
  launch(flat(vectors, stream), arrange_bf16_kernel,
         reinterpret_cast<uint4*>(codes) + first_row / 16 * ceil_div(cols, 64) * 128, source, n, cols, order, vectors);
}

void arrange_mxfp4(uint8_t* codes, const uint8_t* source, int64_t first_row, int64_t n, int64_t cols, RowOrder order,
                   cudaStream_t stream) {
  const int64_t words = ceil_div(n, 16) * ceil_div(cols, 64) * 128;
  launch(flat(words, stream), arrange_mxfp4_kernel,
         reinterpret_cast<uint32_t*>(codes) + first_row / 16 * ceil_div(cols, 64) * 128, source, n, cols, order, words);
}

void arrange_scales(uint8_t* scales, const uint8_t* source, int64_t first_row, int64_t n, int64_t cols, RowOrder order,
                    cudaStream_t stream) {
  const int64_t bytes = ceil_div(n, 16) * ceil_div(cols, 64) * 32;
  launch(flat(bytes, stream), arrange_scales_kernel, scales + first_row / 16 * ceil_div(cols, 64) * 32, source, n, cols, order,
         bytes);
}

}  // namespace gptoss::cuda
