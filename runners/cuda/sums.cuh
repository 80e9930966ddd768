#pragma once

// What warps add up together in shared memory.

#include "entries.h"
#include "ring.cuh"

namespace nanochat_x::cuda {

inline constexpr int kSumSlots = (kProductWarps + 3) / 4 * 4;

// Of a row, the sums of each warp's part of the columns; behind the last warp's are zeros. Padded: neighbouring rows
// lie in different banks.
using RowSums = float[kSumSlots + 4];

struct Sums {
  alignas(16) RowSums parts[2][kPassRows];  // used in turns
};

__device__ inline void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

__device__ inline float total_of(const RowSums& parts) {
  float4 total = *reinterpret_cast<const float4*>(parts);
#pragma unroll
  for (int i = 4; i < kSumSlots; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(parts + i);
    total = make_float4(total.x + four.x, total.y + four.y, total.z + four.z, total.w + four.w);
  }
  return (total.x + total.y) + (total.z + total.w);
}

}  // namespace nanochat_x::cuda
