#pragma once

// Products of a block's rows of a bfloat16 matrix with one vector, on the tensor cores: they take a tenth of the
// instructions that multiply-adds would.
//
// A lane reads 16 bytes of a row: 8 columns, four registers of two. They go to the tensor core as they are, as rows g
// and g + 8 of its left operand (g = lane / 4): registers 0 and 2 as two column pairs of row g, registers 1 and 3 as
// the same of row g + 8. The right operand has the x that belongs to registers 0 and 2 in its column 0, that of 1 and 3
// in its column 1. So element (g, 0) plus element (g + 8, 1) of the result is the product of the row, with 32 columns
// of 8 rows an instruction and no register moved. Of the eight columns up to four vectors (a batch) take two each: lane
// l then has products with vector l % 4.

#include <cuda_bf16.h>

#include <cstdint>

#include "entries.h"
#include "exchange.cuh"
#include "sums.cuh"
#include "vector.cuh"

namespace nanochat_x::cuda {

// sum += weights * x: 16 x 16 times 16 x 8
__device__ inline void multiply(float4& sum, const uint4& weights, const uint2& x) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum.x), "+f"(sum.y), "+f"(sum.z), "+f"(sum.w)
      : "r"(weights.x), "r"(weights.y), "r"(weights.z), "r"(weights.w), "r"(x.x), "r"(x.y));
}

// The right operand for a group of x. Every lane loads, as a branch would wait for each load by itself. BATCH: 1, or 4;
// of vectors that are not there any bytes are taken, and their sums left.
template <int BATCH>
__device__ uint2 right_operand(const Vector& x, int group) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint4 four = *reinterpret_cast<const uint4*>(x.row(BATCH == 1 ? 0 : lane / 8).group(group) + 16 * (lane % 4));
  const bool used = lane < 8 * BATCH, first = lane % 8 < 4;
  return make_uint2(used ? (first ? four.x : four.y) : 0, used ? (first ? four.z : four.w) : 0);
}

// Warps take tiles in turn: how far behind tile `first` the one lies that this warp takes.
__device__ inline int turn_of(int warp, int first) {
  return (warp + kConsumerWarps - first % kConsumerWarps) % kConsumerWarps;
}

// finish(vector, row, sum) for the rows of a pass from `first` on, a thread each.
template <int BATCH, typename Finish>
__device__ void finish_pass(const Sums& sums, const RowSums* mine, int first, Finish finish) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < (BATCH == 1 ? kPassRows : sums.batch * kPassRows)) {
    finish(BATCH == 1 ? 0 : thread / kPassRows, first + thread % kPassRows, total_of(mine[thread]));
  }
}

template <WeightFormat FORMAT>
struct Product;

template <>
struct Product<WeightFormat::kBfloat16> {
  using E = Entries<WeightFormat::kBfloat16>;

  // Rows of n_embd columns, of which each warp but the last takes one group of each kProductWarps; the last one calls
  // meanwhile(), once. Then finish(vector, row, sum) by the first warps, a lane for each row of a pass, and for rows
  // that are not there. GROUPS: those of a warp, at most.
  template <int GROUPS, int BATCH, typename Meanwhile, typename Finish>
  static __device__ void wide(RingReader& ring, const Sums& sums, unsigned& turn, const Vector& x, int n_embd, int rows,
                              Meanwhile meanwhile, Finish finish) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int groups = n_embd / kGroup, size = E::wide_bytes(n_embd), pitch = E::pitch(n_embd);
    uint2 part[GROUPS];   // of x
    int columns[GROUPS];  // where lane and warp read in a row, in bytes
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) {
      const int group = warp + i * kProductWarps;
      part[i] = right_operand<BATCH>(x, min(group, groups - 1));
      columns[i] = min(group, groups - 1) * kGroupBytes + 16 * (lane % 4);
      if (group >= groups) part[i] = make_uint2(0, 0);  // and any weights that are there
    }
    for (int first = 0; first < rows; first += kPassRows) {
      const int count = min(kPassRows, rows - first);
      RowSums* mine = sums.of(turn++);
      if (warp >= kProductWarps) {
        if (first == 0) meanwhile();
        for (int row = 0; row < count; row += E::kWideRows) ring.pass(size);
        ring.release(kConsumerWarps, (count + E::kWideRows - 1) / E::kWideRows);
      }
      for (int row = 0; row < count && warp < kProductWarps; row += 2 * E::kWideRows) {
        const bool two = row + E::kWideRows < count;
        WarpEntry<GROUPS> a{}, b{};
        // Lanes of rows that are not there read the last one again; their sums are left.
        a.load(ring.take(size) + min(lane / 4, count - row - 1) * pitch, columns);
        if (two) b.load(ring.take(size) + min(lane / 4, count - row - E::kWideRows - 1) * pitch, columns);
        const float sum = a.times(part), other = two ? b.times(part) : 0.0F;
        ring.release(kConsumerWarps, two ? 2 : 1);
        if (lane % 4 < (BATCH == 1 ? 1 : sums.batch)) {
          RowSums* to = mine + (BATCH == 1 ? 0 : lane % 4 * kPassRows) + row + lane / 4;
          to[0][warp] = sum;
          if (two) to[E::kWideRows][warp] = other;
        }
      }
      consumers_sync();
      finish_pass<BATCH>(sums, mine, first, finish);
    }
  }

  // Rows (a multiple of 32) of `width` columns, each by one warp; their sums as words with a flag, four rows each,
  // those of the vectors of a batch `stride` apart.
  template <int BATCH>
  static __device__ void narrow(RingReader& ring, const Vector& x, int width, int rows, int batch, uint4* words,
                                int stride, unsigned flag) {
    constexpr int kTiles = kNarrowRows / 8;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int size = E::narrow_bytes(width);
    for (int row = 0; row < rows; row += kNarrowRows) {
      const int tile = turn_of(warp, row / 8);
      if (tile >= kTiles) {
        ring.pass(size);
        continue;
      }
      const unsigned char* weights = ring.take(size) + (8 * tile + lane / 4) * 128;
      // The copy engine has exchanged 16-byte pieces of a row by its number.
      const int low = 16 * ((lane % 4) ^ (lane / 4)), high = low ^ 64;
      float4 even = make_float4(0, 0, 0, 0), odd = even;  // apart, as each sum waits for the one before
#pragma unroll 4
      for (int box = 0; box < width / E::kBoxColumns; ++box) {
        const uint4 a = *reinterpret_cast<const uint4*>(weights + box * E::kBoxBytes + low);
        const uint4 b = *reinterpret_cast<const uint4*>(weights + box * E::kBoxBytes + high);
        multiply(even, a, right_operand<BATCH>(x, 2 * box));
        multiply(odd, b, right_operand<BATCH>(x, 2 * box + 1));
      }
      const float sum = even.x + even.w + odd.x + odd.w;
      const float second = __shfl_down_sync(~0U, sum, 4), third = __shfl_down_sync(~0U, sum, 8),
                  fourth = __shfl_down_sync(~0U, sum, 12);
      if (lane % 16 < (BATCH == 1 ? 1 : batch)) {
        store_sums(words + (BATCH == 1 ? 0 : lane % 16 * stride) + (row + 8 * tile) / 4 + lane / 16,
                   make_float4(sum, second, third, fourth), flag);
      }
      ring.release(kTiles, 1);
    }
  }

 private:
  // A warp's groups of one entry of the ring, of all eight rows.
  template <int GROUPS>
  struct WarpEntry {
    uint4 weights[GROUPS];

    __device__ void load(const unsigned char* row, const int (&columns)[GROUPS]) {
#pragma unroll
      for (int i = 0; i < GROUPS; ++i) weights[i] = *reinterpret_cast<const uint4*>(row + columns[i]);
    }
    __device__ float times(const uint2 (&x)[GROUPS]) const {
      float4 even = make_float4(0, 0, 0, 0), odd = even;
#pragma unroll
      for (int i = 0; i < GROUPS; ++i) multiply(i % 2 == 0 ? even : odd, weights[i], x[i]);
      return even.x + even.w + odd.x + odd.w;
    }
  };
};

}  // namespace nanochat_x::cuda
