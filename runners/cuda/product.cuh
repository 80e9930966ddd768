#pragma once

// Products of the block's rows of a matrix with one vector, on the tensor cores: they take a tenth of the instructions
// that multiply-adds would.
//
// A lane reads 16 bytes of a row: 8 columns, four registers of two. They go to the tensor core as they are, as rows g
// and g + 8 of its left operand (g = lane / 4): registers 0 and 2 as two column pairs of row g, registers 1 and 3 as
// the same of row g + 8. The right operand has the x that belongs to registers 0 and 2 in its column 0, that of 1 and 3
// in its column 1. So element (g, 0) plus element (g + 8, 1) of the result is the product of the row, with 32 columns
// of 8 rows an instruction and no register moved.

#include <cuda_bf16.h>

#include <cstdint>

#include "ring.cuh"

namespace nanochat_x::cuda {

inline constexpr int kPassTiles = kPassRows / kTile;

struct Sums {
  alignas(16) float warp[2][kPassRows][kConsumerWarps];  // of each warp's part of the columns; two, used in turns
};

__device__ inline void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

// sum += weights * x: 16 x 16 times 16 x 8
__device__ inline void multiply(float4& sum, const uint4& weights, const uint2& x) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum.x), "+f"(sum.y), "+f"(sum.z), "+f"(sum.w)
      : "r"(weights.x), "r"(weights.y), "r"(weights.z), "r"(weights.w), "r"(x.x), "r"(x.y));
}

// A warp's columns of one entry of the ring: 32 of each 256, of all eight rows.
template <int STEPS>
struct WarpEntry {
  uint4 weights[STEPS];

  // `columns`: where lane and warp read in a row; `last`: where in the last step, which may lie behind the row's end.
  __device__ void load(const unsigned char* row, int columns, int last) {
#pragma unroll
    for (int step = 0; step < STEPS - 1; ++step) {
      weights[step] = *reinterpret_cast<const uint4*>(row + columns + 2 * 32 * kConsumerWarps * step);
    }
    weights[STEPS - 1] = *reinterpret_cast<const uint4*>(row + last);
  }

  __device__ float times(const uint2 (&x)[STEPS]) const {
    float4 even = make_float4(0, 0, 0, 0), odd = even;  // apart, as each sum waits for the one before
#pragma unroll
    for (int step = 0; step < STEPS; ++step) multiply(step % 2 == 0 ? even : odd, weights[step], x[step]);
    return even.x + even.w + odd.x + odd.w;
  }
};

__device__ inline float total_of(const float (&parts)[kConsumerWarps]) {
  const float4 low = *reinterpret_cast<const float4*>(parts), high = *reinterpret_cast<const float4*>(parts + 4);
  return (low.x + low.y + low.z + low.w) + (high.x + high.y + high.z + high.w);
}

// Feeds the block's `rows` rows of a matrix with `chunks` * n_embd columns through the ring, and calls
// finish(row, sums) for each pair of rows, in every warp (row, even, counts from the block's first; lane l has the
// pass's rows 2 l and 2 l + 1). STEPS: n_embd / 256, rounded up. x: bfloat16 in shared memory. The order of entries is
// that of `stream` in decode_kernel.cuh.
template <int STEPS, typename Finish>
__device__ void product(RingReader& ring, Sums& sums, unsigned& turn, const __nv_bfloat16* x, int n_embd, int rows,
                        int chunks, Finish finish) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int columns = 64 * warp + 16 * (lane % 4);  // in bytes
  // Behind the row's end x is zero, and the weights are any that are there.
  const bool has_last = 32 * ((STEPS - 1) * kConsumerWarps + warp) < n_embd;
  const int last = has_last ? columns + 64 * kConsumerWarps * (STEPS - 1) : columns % 64;
  for (int first = 0; first < rows; first += kPassRows) {
    const int count = min(kPassRows, rows - first);
    float sum[kPassTiles] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      uint2 part[STEPS];  // of x
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        // Every lane loads, as a branch would wait for each load by itself; but for the first eight it is zero.
        const int at = step < STEPS - 1 ? columns + 64 * kConsumerWarps * step : last;
        const uint4 four =
            *reinterpret_cast<const uint4*>(reinterpret_cast<const unsigned char*>(x + chunk * n_embd) + at);
        const bool own = lane < 8 && (step < STEPS - 1 || has_last);
        part[step].x = own ? (lane < 4 ? four.x : four.y) : 0;
        part[step].y = own ? (lane < 4 ? four.z : four.w) : 0;
      }
#pragma unroll
      for (int tile = 0; tile < kPassTiles; tile += 2) {
        if (tile * kTile >= count) break;
        const bool two = tile + 1 < kPassTiles && (tile + 1) * kTile < count;
        const int here = min(kTile, count - tile * kTile), next = min(kTile, count - (tile + 1) * kTile);
        // Lanes of rows that are not there read the last one again; their sums are left.
        WarpEntry<STEPS> a{}, b{};
        ring.wait(ring.entry);
        a.load(ring.row(ring.slot, min(lane / 4, here - 1)), columns, last);
        if (two) {
          ring.wait(ring.entry + 1);
          b.load(ring.row(ring.behind(here), min(lane / 4, next - 1)), columns, last);
        }
        sum[tile] += a.times(part);
        if (two) sum[tile + 1 < kPassTiles ? tile + 1 : tile] += b.times(part);
        ring.release(here);
        if (two) ring.release(next);
      }
    }
    auto& mine = sums.warp[turn & 1U];
    ++turn;
    if (lane % 4 == 0) {
#pragma unroll
      for (int tile = 0; tile < kPassTiles; ++tile) mine[tile * kTile + lane / 4][warp] = sum[tile];
    }
    consumers_sync();
    if (2 * lane < count) {
      float2 total;
      total.x = total_of(mine[2 * lane]);
      total.y = total_of(mine[2 * lane + 1]);
      finish(first + 2 * lane, total);
    }
  }
}

}  // namespace nanochat_x::cuda
