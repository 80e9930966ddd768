#pragma once

// Products of operands in shared memory by a warpgroup: 64 rows of a left one with up to 64 of a right one, both of 64
// columns of bfloat16, 128 bytes a row, as the copy engine's swizzle lays them.

#include <cstdint>

#include "barrier.cuh"

namespace nanochat_x::cuda {

inline constexpr int kOperandColumns = 64, kOperandRowBytes = 2 * kOperandColumns;

// What the tensor cores are told of an operand: where it begins, that eight of its rows are 1,024 bytes, the swizzle.
__device__ inline std::uint64_t operand_at(std::uint32_t address) {
  constexpr std::uint64_t kEightRows = 8 * kOperandRowBytes >> 4, kSwizzle128 = 1;
  return (address >> 4U & 0x3fffU) | std::uint64_t{1} << 16U | kEightRows << 32U | kSwizzle128 << 62U;
}

// sum[4 j + 2 h + i] is that of left row 16 (warp % 4) + lane / 4 + 8 h and right row 8 j + 2 (lane % 4) + i. ROWS: of
// the right operand. 16 columns.
template <int ROWS>
__device__ void multiply_operands(float (&sum)[ROWS / 2], std::uint64_t left, std::uint64_t right);

template <>
__device__ inline void multiply_operands<16>(float (&s)[8], std::uint64_t left, std::uint64_t right) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, 1, 1, 1, 0, 0;"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7])
      : "l"(left), "l"(right));
}

template <>
__device__ inline void multiply_operands<32>(float (&s)[16], std::uint64_t left, std::uint64_t right) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
      "%13, %14, %15}, %16, %17, 1, 1, 1, 0, 0;"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]), "+f"(s[8]),
        "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15])
      : "l"(left), "l"(right));
}

template <>
__device__ inline void multiply_operands<64>(float (&s)[32], std::uint64_t left, std::uint64_t right) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
      "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, "
      "1, 0, 0;"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]), "+f"(s[8]),
        "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]), "+f"(s[16]),
        "+f"(s[17]), "+f"(s[18]), "+f"(s[19]), "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]), "+f"(s[24]),
        "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31])
      : "l"(left), "l"(right));
}

// Before the first product of those that are committed together.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most PENDING of what was committed is not done.
template <int PENDING, int COUNT>
__device__ void await_products(float (&sum)[COUNT]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
  for (float& value : sum) asm volatile("" : "+f"(value)::"memory");  // the compiler may not read it before
}

}  // namespace nanochat_x::cuda
