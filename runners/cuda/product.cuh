#pragma once

// Products of the block's rows of a matrix with one vector, on the tensor cores: x is the first row of a 16 x 16 operand
// whose other rows are zero, eight rows of weights are the other operand. What is wasted there costs nothing: the
// memory is the limit, and the tensor cores take a tenth of the instructions that multiply-adds would.

#include <cuda_bf16.h>

#include <cstdint>

#include "ring.cuh"

namespace nanochat_x::cuda {

inline constexpr int kPassTiles = kPassRows / kTile;

struct Sums {
  alignas(16) float warp[2][kConsumerWarps][kPassRows];  // of each warp's part of the columns; two, used in turns
};

__device__ inline void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

__device__ inline uint4 load_shared(const void* from) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(shared_address(from)));
  return value;
}

// sum[0 .. 3] += x * w for 16 columns: of x only the eight upper rows (of which this uses the first)
__device__ inline void multiply(float (&sum)[4], std::uint32_t x0, std::uint32_t x1, std::uint32_t w0,
                                std::uint32_t w1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %5}, {%7, %8}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(x0), "r"(0U), "r"(x1), "r"(w0), "r"(w1));
}

// Feeds the block's `rows` rows of a matrix with `chunks` * n_embd columns through the ring, and calls
// finish(row, sum) in one thread a row (row counts from the block's first; threads 0 to rows - 1 of each pass). STEPS:
// n_embd / 256, rounded up. x: bfloat16 in shared memory. The order of entries is that of `stream` in decode.cu.
template <int STEPS, typename Finish>
__device__ void product(RingReader& ring, Sums& sums, unsigned& turn, const __nv_bfloat16* x, int n_embd, int rows,
                        int chunks, Finish finish) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  for (int first = 0; first < rows; first += kPassRows) {
    const int count = min(kPassRows, rows - first);
    float sum[kPassTiles][2][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      uint4 part[STEPS];  // of x: lane t of the first four has 8 columns of every 32
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const int column = 32 * (step * kConsumerWarps + warp);
        part[step] = make_uint4(0, 0, 0, 0);
        if (lane < 4 && column < n_embd) part[step] = load_shared(x + chunk * n_embd + column + 8 * lane);
      }
#pragma unroll
      for (int tile = 0; tile < kPassTiles; ++tile) {
        if (tile * kTile < count) {
          const int here = min(kTile, count - tile * kTile);
          // Lanes of rows that are not there read the last one again; their sums are left.
          const unsigned char* row = ring.row(min(lane / 4, here - 1)) + 16 * (lane % 4);
          ring.wait();
#pragma unroll
          for (int step = 0; step < STEPS; ++step) {
            const int column = 32 * (step * kConsumerWarps + warp);
            if (column < n_embd) {
              const uint4 weights = load_shared(row + 2 * column);
              multiply(sum[tile][0], part[step].x, part[step].y, weights.x, weights.y);
              multiply(sum[tile][1], part[step].z, part[step].w, weights.z, weights.w);
            }
          }
          ring.release(here);
        }
      }
    }
    auto& mine = sums.warp[turn & 1U];
    ++turn;
    if (lane < 4) {
#pragma unroll
      for (int tile = 0; tile < kPassTiles; ++tile) {
        *reinterpret_cast<float2*>(&mine[warp][tile * kTile + 2 * lane]) =
            make_float2(sum[tile][0][0] + sum[tile][1][0], sum[tile][0][1] + sum[tile][1][1]);
      }
    }
    consumers_sync();
    if (thread < count) {
      float total = 0;
#pragma unroll
      for (int other = 0; other < kConsumerWarps; ++other) total += mine[other][thread];
      finish(first + thread, total);
    }
  }
}

}  // namespace nanochat_x::cuda
