#pragma once

// Attention of few tokens of many sequences, which is limited by reading keys and values: a block takes one query of
// one head, or one piece of the keys that it sees where there are too few of them for the card.

#include <cuda_bf16.h>

#include <cstdint>

#include "attend_params.h"
#include "decode_params.h"
#include "dependent.cuh"
#include "packed.cuh"

namespace nanochat_x::cuda {

inline constexpr int kTokenThreads = 128, kTokenWarps = kTokenThreads / 32;
inline constexpr int kMostPieces = 16;
inline constexpr int kLoads = 2;  // of four keys each, which a warp has in flight

// 16 elements of a bfloat16 row in a lane.
struct Sixteen {
  uint4 low, high;

  __device__ void load(const __nv_bfloat16* from) {
    low = __ldcg(reinterpret_cast<const uint4*>(from));
    high = __ldcg(reinterpret_cast<const uint4*>(from) + 1);
  }
  // use(i, two): for the eight pairs
  template <typename Use>
  __device__ void each(Use use) const {
    const std::uint32_t words[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) use(i, unpack(words[i]));
  }
};

// What a warp has of a query's attention: lane l has dims 16 (l % 8) and on, of every fourth key.
struct WarpPart {
  float out[16] = {};
  float largest = -INFINITY, total = 0;

  // Of the keys begin <= key < end every (4 kLoads) of each (4 kLoads kTokenWarps).
  __device__ void attend(const float (&q)[16], const __nv_bfloat16* keys, const __nv_bfloat16* values, int begin,
                         int end) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    constexpr int kStep = 4 * kLoads;
    for (int base = begin + warp * kStep; base < end; base += kStep * kTokenWarps) {
      Sixteen k[kLoads], v[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const long long at = static_cast<long long>(min(base + 4 * i + lane / 8, end - 1)) * kHeadDim + 16 * (lane % 8);
        k[i].load(keys + at);
        v[i].load(values + at);
      }
      float score[kLoads], top = largest;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        score[i] = 0;
        k[i].each([&](int j, float2 two) { score[i] += two.x * q[2 * j] + two.y * q[2 * j + 1]; });
        score[i] = lanes_sum<8>(score[i]);
        if (base + 4 * i + lane / 8 >= end) score[i] = -INFINITY;
        top = fmaxf(top, score[i]);
      }
      top = fmaxf(top, __shfl_xor_sync(~0U, top, 8));
      top = fmaxf(top, __shfl_xor_sync(~0U, top, 16));
      const float fade = exp2f(largest - top);  // 0 at first
      largest = top;
      total *= fade;
#pragma unroll
      for (float& value : out) value *= fade;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const float weight = exp2f(score[i] - top);
        total += weight;
        v[i].each([&](int j, float2 two) {
          out[2 * j] += weight * two.x;
          out[2 * j + 1] += weight * two.y;
        });
      }
    }
    // Lanes l, l + 8, l + 16 and l + 24 have the same dims of different keys.
#pragma unroll
    for (int distance = 8; distance < 32; distance *= 2) {
      total += __shfl_xor_sync(~0U, total, distance);
#pragma unroll
      for (float& value : out) value += __shfl_xor_sync(~0U, value, distance);
    }
  }
};

// Adds up the warps' parts, and writes the query's output, or what this piece of the keys has of it.
__device__ inline void write_query(const AttendParams& p, const WarpPart& part, int row, int head, int piece,
                                   int pieces) {
  __shared__ alignas(16) float sums[kTokenWarps][kHeadDim];
  __shared__ float tops[kTokenWarps], totals[kTokenWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  if (lane < 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      reinterpret_cast<float4*>(&sums[warp][16 * lane])[i] =
          make_float4(part.out[4 * i], part.out[4 * i + 1], part.out[4 * i + 2], part.out[4 * i + 3]);
    }
  }
  if (lane == 0) {
    tops[warp] = part.largest;
    totals[warp] = part.total;
  }
  __syncthreads();
  float top = -INFINITY;
#pragma unroll
  for (const float other : tops) top = fmaxf(top, other);
  float sum = 0, total = 0;
#pragma unroll
  for (int i = 0; i < kTokenWarps; ++i) {
    const float weight = tops[i] == -INFINITY ? 0 : exp2f(tops[i] - top);  // a warp, or a piece, may have no key
    sum += weight * sums[i][thread];
    total += weight * totals[i];
  }
  const long long which = static_cast<long long>(row) * p.n_head + head;
  if (pieces == 1) {
    p.out[which * kHeadDim + thread] = __float2bfloat16(sum / total);
    return;
  }
  float* to = p.parts + (which * pieces + piece) * kPartStride;
  to[thread] = sum;
  if (thread == 0) {
    to[kHeadDim] = top;
    to[kHeadDim + 1] = total;
  }
}

// Grid: pieces, heads, queries.
__global__ void __launch_bounds__(kTokenThreads) attend_tokens(const __grid_constant__ AttendParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int piece = static_cast<int>(blockIdx.x), pieces = static_cast<int>(gridDim.x);
  const int head = static_cast<int>(blockIdx.y), row = static_cast<int>(blockIdx.z);
  const int position = p.position[row / p.length] + row % p.length;
  const int first = max(0, position - p.window), count = position + 1 - first;
  const int each = (count + pieces - 1) / pieces;
  const int begin = first + min(piece * each, count), end = min(begin + each, position + 1);
  const long long from = row / p.length * p.cache_row + head / p.group * p.cache_head;
  float q[16];
  Sixteen raw;
  raw.load(p.q + row * p.q_stride + head * kHeadDim + 16 * (lane % 8));
  raw.each([&](int i, float2 two) {
    q[2 * i] = two.x * kScoreScale;
    q[2 * i + 1] = two.y * kScoreScale;
  });
  WarpPart part;
  part.attend(q, p.keys + from, p.values + from, begin, end);
  write_query(p, part, row, head, piece, pieces);
}

// Grid: heads, queries. A thread has a dim.
__global__ void __launch_bounds__(kHeadDim) join_pieces(const float* parts, int pieces, __nv_bfloat16* out) {
  allow_dependent();
  await_dependence();
  const long long which = static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x;
  parts += which * pieces * kPartStride;
  float top = -INFINITY;
  for (int i = 0; i < pieces; ++i) top = fmaxf(top, parts[i * kPartStride + kHeadDim]);
  float sum = 0, total = 0;
  for (int i = 0; i < pieces; ++i) {
    const float* part = parts + i * kPartStride;
    if (part[kHeadDim] == -INFINITY) continue;
    const float weight = exp2f(part[kHeadDim] - top);
    sum += weight * part[threadIdx.x];
    total += weight * part[kHeadDim + 1];
  }
  out[which * kHeadDim + threadIdx.x] = __float2bfloat16(sum / total);
}

}  // namespace nanochat_x::cuda
