#pragma once

// What warps add up together in shared memory.

#include "entries.h"
#include "ring.cuh"

namespace nanochat_x::cuda {

// In shared memory from an offset on, RowSums [2, batch, kPassRows]: two passes in turns, of so many vectors. Behind
// the last warp's slot of each row are zeros.
struct Sums {
  int offset, batch;

  __device__ RowSums* all() const { return reinterpret_cast<RowSums*>(shared_memory + offset); }
  __device__ RowSums* of(unsigned turn) const { return all() + (turn & 1U) * static_cast<unsigned>(batch * kPassRows); }
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
