#pragma once

// Products of rows in 8 or 4 bits with one vector, on the tensor cores, in integers.
//
// A tile of weights, 16 rows by a group of 32 columns, is the left operand as it lies in memory; the right one has the
// high bytes of x in one of its columns and the low bytes in the next. Four tiles (a quad) take two columns each and
// add to one result: lane l then has the sums of tile l % 4, exact, and scales are applied once for the four. Of 4 bits
// the upper ones of a byte are multiplied where they are, as 16 times what they stand for. With a batch of up to four
// vectors these take the columns, two each, and a tile's sums with vector l % 4 are in lane l.

#include <cstdint>

#include "entries.h"
#include "packed.cuh"
#include "product_bfloat16.cuh"
#include "vector.cuh"

namespace nanochat_x::cuda {

// sum += weights * x: 16 x 32 times 32 x 8. Weights of 4 bits have no sign.
template <int BITS>
__device__ void multiply(int4& sum, const uint4& weights, const uint2& x) {
  if constexpr (BITS == 8) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(sum.x), "+r"(sum.y), "+r"(sum.z), "+r"(sum.w)
        : "r"(weights.x), "r"(weights.y), "r"(weights.z), "r"(weights.w), "r"(x.x), "r"(x.y));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(sum.x), "+r"(sum.y), "+r"(sum.z), "+r"(sum.w)
        : "r"(weights.x), "r"(weights.y), "r"(weights.z), "r"(weights.w), "r"(x.x), "r"(x.y));
  }
}

template <int BATCH>
inline constexpr int kQuad = 4 / BATCH;  // tiles that are multiplied into one result

// Four groups of x as the tensor cores take them: `first`, and three more with a stride. If not all of them are there,
// those from `groups` on are zeros.
template <int BATCH, bool WHOLE>
struct QuadOperand {
  uint2 x{};       // the lane's column: of group or vector lane / 8
  float step = 0;  // of group or vector lane % 4
  int sum = 0;

  QuadOperand() = default;
  __device__ QuadOperand(const Vector& from, int first, int stride, int groups) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int own = first + lane / 8 / BATCH * stride, told = first + lane % 4 / BATCH * stride;
    const bool has_own = WHOLE || own < groups, is_told = WHOLE || told < groups;
    const Vector own_vector = from.row(lane / 8 % BATCH), told_vector = from.row(lane % BATCH);
    const unsigned char* bytes = own_vector.group(has_own ? own : 0) + (lane & 4 ? kGroup : 0) + 4 * (lane % 4);
    const std::uint32_t a = *reinterpret_cast<const std::uint32_t*>(bytes),
                        b = *reinterpret_cast<const std::uint32_t*>(bytes + kGroup / 2);
    x = make_uint2(has_own ? a : 0, has_own ? b : 0);
    const uint2 info = *reinterpret_cast<const uint2*>(&told_vector.info(is_told ? told : 0));
    step = is_told ? __uint_as_float(info.x) : 0;
    sum = static_cast<int>(info.y);
  }
  // The right operand for tile `which` of a quad.
  __device__ uint2 of(int which) const {
    const bool own = BATCH == 4 || static_cast<int>(threadIdx.x) % 32 / 8 == which;
    return make_uint2(own ? x.x : 0, own ? x.y : 0);
  }
};

template <int BITS>
struct PackedProduct {
  using E = PackedEntries<BITS>;

  // As that of bfloat16.
  template <int GROUPS, int BATCH, typename Meanwhile, typename Finish>
  static __device__ void wide(RingReader& ring, const Sums& sums, unsigned& turn, const Vector& x, int n_embd, int rows,
                              Meanwhile meanwhile, Finish finish) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int groups = n_embd / kGroup, size = E::wide_bytes(n_embd);
    constexpr int kTiles = kQuad<BATCH>, kQuads = (GROUPS + kTiles - 1) / kTiles, kStride = kTiles * kProductWarps;
    QuadOperand<BATCH, false> operands[kQuads]{};  // or its registers would be taken all the time
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (warp < kProductWarps) operands[i] = QuadOperand<BATCH, false>(x, warp + i * kStride, kProductWarps, groups);
    }
    for (int first = 0; first < rows; first += kPassRows) {
      const int count = min(kPassRows, rows - first);
      RowSums* mine = sums.of(turn++);
      if (warp >= kProductWarps) {
        if (first == 0) meanwhile();
        for (int row = 0; row < count; row += E::kWideRows) ring.pass(size);
      }
      for (int row = 0; row < count && warp < kProductWarps; row += E::kWideRows) {
        const unsigned char* entry = ring.take(size);
        Quad<BATCH> quads[kQuads]{};
        float2 sum = make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          quads[i].template load<false>(entry, groups, warp + i * kStride, kProductWarps, GROUPS - i * kTiles);
        }
#pragma unroll
        for (int i = 0; i < kQuads; ++i) quads[i].add(sum, operands[i], GROUPS - i * kTiles);
        if constexpr (BATCH == 1) {
          // Of two lanes each gives the other's row away.
          const bool odd = lane & 1;
          float total = (odd ? sum.y : sum.x) + __shfl_xor_sync(~0U, odd ? sum.x : sum.y, 1);
          total += __shfl_xor_sync(~0U, total, 2);
          if (lane % 4 < 2) mine[row + lane / 4 * 2 + lane % 4][warp] = odd ? kUpperFactor * total : total;
        } else if (lane % 4 < sums.batch) {
          RowSums* to = mine + lane % 4 * kPassRows + row + lane / 4 * 2;
          to[0][warp] = sum.x;
          to[1][warp] = kUpperFactor * sum.y;
        }
      }
      consumers_sync();
      // Once for all: an arrival takes some 20 clocks, in which no other is counted.
      if (warp == kConsumerWarps - 1) ring.release_all((count + E::kWideRows - 1) / E::kWideRows);
      finish_pass<BATCH>(sums, mine, first, finish);
    }
  }

  template <int BATCH>
  static __device__ void narrow(RingReader& ring, const Vector& x, int width, int rows, int batch, uint4* words,
                                int stride, unsigned flag) {
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
#pragma unroll(BATCH == 1 ? 2 : 4)
      for (int i = 0; i < groups; i += kQuad<BATCH>) {
        Quad<BATCH> weights{};
        weights.template load<true>(entry, kTiles * groups, tile * groups + i, 1, kQuad<BATCH>);
        weights.add(sum, QuadOperand<BATCH, true>(x, i, 1, groups), kQuad<BATCH>);
      }
      sum = make_float2(lanes_sum<kQuad<BATCH>>(sum.x), kUpperFactor * lanes_sum<kQuad<BATCH>>(sum.y));
      const float third = __shfl_down_sync(~0U, sum.x, 4), fourth = __shfl_down_sync(~0U, sum.y, 4);
      if (lane % 8 < (BATCH == 1 ? 1 : batch)) {
        store_sums(words + (BATCH == 1 ? 0 : lane % 8 * stride) + (row + E::kTileRows * tile) / 4 + lane / 8,
                   make_float4(sum.x, sum.y, third, fourth), flag);
      }
      ring.release(kTiles, 1);
    }
  }

 private:
  // By what sums of rows 2 g + 1 are too large.
  static constexpr float kUpperFactor = BITS == 4 ? 0.0625F : 1.0F;

  // What a lane has of four tiles, or with a batch of one.
  template <int BATCH>
  struct Quad {
    uint4 weights[kQuad<BATCH>];  // of 4 bits: two registers of eight
    std::uint32_t scales;         // of tile lane % 4, rows 2 g and 2 g + 1 (g = lane / 4), bfloat16
    unsigned zeros;               // likewise, a byte each

    // Tiles `first` and three more with a stride, of an entry of `tiles`: the first `most`, a constant, of them, and
    // if not all of these are there those below `tiles`.
    template <bool WHOLE>
    __device__ void load(const unsigned char* entry, int tiles, int first, int stride, int most) {
      const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
      for (int i = 0; i < kQuad<BATCH>; ++i) {
        weights[i] = make_uint4(0, 0, 0, 0);
        if (i >= most || (!WHOLE && first + i * stride >= tiles)) continue;
        const unsigned char* from = entry + (first + i * stride) * E::kTileBytes + lane * E::kLaneBytes;
        if constexpr (BITS == 8) {
          weights[i] = *reinterpret_cast<const uint4*>(from);
        } else {
          const uint2 two = *reinterpret_cast<const uint2*>(from);
          weights[i] = make_uint4(two.x, two.y, 0, 0);
        }
      }
      const int own = first + lane % 4 / BATCH * stride, told = WHOLE || own < tiles ? own : 0;
      const unsigned char* scales_from = entry + tiles * E::kTileBytes;
      scales = *reinterpret_cast<const std::uint32_t*>(scales_from + told * E::kScaleBytes + 4 * (lane / 4));
      if constexpr (BITS == 4) {
        zeros = *reinterpret_cast<const unsigned short*>(scales_from + tiles * E::kScaleBytes + told * E::kZeroBytes +
                                                         2 * (lane / 4));
      }
    }

    // The lane's tile, or vector; sums of rows 2 g + 1 are to be multiplied by kUpperFactor.
    template <bool WHOLE>
    __device__ void add(float2& sum, const QuadOperand<BATCH, WHOLE>& operand, int most) const {
      int4 both = make_int4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < kQuad<BATCH>; ++i) {
        if (i >= most) continue;
        uint4 left = weights[i];
        if constexpr (BITS == 4) {
          left = make_uint4(left.x & 0x0f0f0f0fU, left.x & 0xf0f0f0f0U, left.y & 0x0f0f0f0fU, left.y & 0xf0f0f0f0U);
        }
        multiply<BITS>(both, left, operand.of(i));
      }
      int a = both.x * 256 + both.y, b = both.z * 256 + both.w;
      if constexpr (BITS == 4) {
        a -= static_cast<int>(zeros & 255U) * operand.sum;
        b -= static_cast<int>(zeros >> 4U) * operand.sum;  // a zero has 4 bits: 16 times that of row 2 g + 1
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
