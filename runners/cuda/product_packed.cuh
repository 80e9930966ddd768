#pragma once

// Products of rows in 8 or 4 bits with one vector, on the tensor cores, in integers.
//
// A tile of weights, 16 rows by a group of 32 columns, is the left operand as it lies in memory (4 bits are widened to
// 8 by two operations for each eight); the right one has the high bytes of x in its column 0 and the low bytes in its
// column 1. Sums of a group are exact.

#include <cstdint>

#include "entries.h"
#include "packed.cuh"
#include "product_bfloat16.cuh"
#include "vector.cuh"

namespace nanochat_x::cuda {

__device__ inline int4 multiply(const uint4& weights, const uint2& x) {
  int4 sum;
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=r"(sum.x), "=r"(sum.y), "=r"(sum.z), "=r"(sum.w)
      : "r"(weights.x), "r"(weights.y), "r"(weights.z), "r"(weights.w), "r"(x.x), "r"(x.y), "r"(0));
  return sum;
}

// A group of x as the tensor cores take it.
struct PackedOperand {
  uint2 x{};
  float step = 0;
  int sum = 0;

  PackedOperand() = default;
  __device__ PackedOperand(const Vector& from, int group) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const unsigned char* bytes = from.group(group) + (lane & 4 ? kGroup : 0) + 4 * (lane % 4);
    const std::uint32_t a = *reinterpret_cast<const std::uint32_t*>(bytes),
                        b = *reinterpret_cast<const std::uint32_t*>(bytes + kGroup / 2);
    x = make_uint2(lane < 8 ? a : 0, lane < 8 ? b : 0);
    const uint2 info = *reinterpret_cast<const uint2*>(&from.info(group));
    step = __uint_as_float(info.x);
    sum = static_cast<int>(info.y);
  }
};

template <int BITS>
struct PackedProduct {
  using E = PackedEntries<BITS>;

  // As that of bfloat16.
  template <int GROUPS, typename Meanwhile, typename Finish>
  static __device__ void wide(RingReader& ring, Sums& sums, unsigned& turn, const Vector& x, int n_embd, int rows,
                              Meanwhile meanwhile, Finish finish) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int groups = n_embd / kGroup, size = E::wide_bytes(n_embd);
    PackedOperand operand[GROUPS]{};  // or its registers would be taken all the time
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) {
      if (warp + i * kProductWarps < groups) operand[i] = PackedOperand(x, warp + i * kProductWarps);
    }
    for (int first = 0; first < rows; first += kPassRows) {
      const int count = min(kPassRows, rows - first);
      auto& mine = sums.parts[turn & 1U];
      ++turn;
      if (warp >= kProductWarps) {
        if (first == 0) meanwhile();
        for (int row = 0; row < count; row += E::kWideRows) ring.pass(size);
      }
      for (int row = 0; row < count && warp < kProductWarps; row += E::kWideRows) {
        const unsigned char* entry = ring.take(size);
        Tile tiles[GROUPS]{};
        float2 sum = make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) {
          if (warp + i * kProductWarps < groups) tiles[i].load(entry, groups, warp + i * kProductWarps);
        }
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) {
          if (warp + i * kProductWarps < groups) tiles[i].add(sum, operand[i]);
        }
        if (lane % 4 == 0) {
          mine[row + lane / 2][warp] = sum.x;
          mine[row + lane / 2 + 1][warp] = sum.y;
        }
      }
      consumers_sync();
      // Once for all: an arrival takes some 20 clocks, in which no other is counted.
      if (warp == kConsumerWarps - 1) ring.release_all((count + E::kWideRows - 1) / E::kWideRows);
      if (threadIdx.x < kPassRows) finish(first + static_cast<int>(threadIdx.x), total_of(mine[threadIdx.x]));
    }
  }

  static __device__ void narrow(RingReader& ring, const Vector& x, int width, int rows, uint4* words, unsigned flag) {
    constexpr int kTiles = kNarrowRows / E::kTileRows;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int groups = width / kGroup, size = E::narrow_bytes(width);
    for (int row = 0; row < rows; row += kNarrowRows) {
      const int tile = turn_of(warp, row / E::kTileRows);
      if (tile >= kTiles) {
        ring.pass(size);
        continue;
      }
      const unsigned char* entry = ring.take(size);
      float2 sum = make_float2(0, 0);
#pragma unroll 4
      for (int i = 0; i < groups; ++i) {
        Tile weights{};
        weights.load(entry, kTiles * groups, tile * groups + i);
        weights.add(sum, PackedOperand(x, i));
      }
      const float third = __shfl_down_sync(~0U, sum.x, 4), fourth = __shfl_down_sync(~0U, sum.y, 4);
      if (lane % 8 == 0) {
        store_sums(words + (row + E::kTileRows * tile) / 4 + lane / 8, make_float4(sum.x, sum.y, third, fourth), flag);
      }
      ring.release(kTiles, 1);
    }
  }

 private:
  // What a lane has of a tile.
  struct Tile {
    uint4 weights;         // of 4 bits: two registers of eight
    std::uint32_t scales;  // of rows 2 g and 2 g + 1 (g = lane / 4), bfloat16
    unsigned zeros;        // likewise, a byte each

    __device__ void load(const unsigned char* entry, int tiles, int which) {
      const int lane = static_cast<int>(threadIdx.x) % 32;
      const unsigned char* from = entry + which * E::kTileBytes + lane * E::kLaneBytes;
      const unsigned char* scales_from = entry + tiles * E::kTileBytes;
      if constexpr (BITS == 8) {
        weights = *reinterpret_cast<const uint4*>(from);
      } else {
        const uint2 two = *reinterpret_cast<const uint2*>(from);
        weights = make_uint4(two.x, two.y, 0, 0);
        zeros = *reinterpret_cast<const unsigned short*>(scales_from + tiles * E::kScaleBytes + which * E::kZeroBytes +
                                                         2 * (lane / 4));
      }
      scales = *reinterpret_cast<const std::uint32_t*>(scales_from + which * E::kScaleBytes + 4 * (lane / 4));
    }

    // Only the lanes that divide by 4 have sums.
    __device__ void add(float2& sum, const PackedOperand& operand) const {
      uint4 left = weights;
      if constexpr (BITS == 4) {
        left = make_uint4(weights.x & 0x0f0f0f0fU, weights.x >> 4U & 0x0f0f0f0fU, weights.y & 0x0f0f0f0fU,
                          weights.y >> 4U & 0x0f0f0f0fU);
      }
      const int4 both = multiply(left, operand.x);
      int a = both.x * 256 + both.y, b = both.z * 256 + both.w;
      if constexpr (BITS == 4) {
        a -= static_cast<int>(zeros & 255U) * operand.sum;
        b -= static_cast<int>(zeros >> 8U) * operand.sum;
      }
      const float2 scale = unpack(scales);
      sum.x += scale.x * operand.step * static_cast<float>(a);
      sum.y += scale.y * operand.step * static_cast<float>(b);
    }
  };
};

template <>
struct Product<WeightFormat::kInt8> : PackedProduct<8> {};
template <>
struct Product<WeightFormat::kInt4> : PackedProduct<4> {};

}  // namespace nanochat_x::cuda
