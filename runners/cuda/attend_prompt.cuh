#pragma once

// Attention of many tokens of a sequence: a block takes 64 queries of one head, a warp 16 of them, and goes through the
// keys that they see in tiles of 64. Scores and sums are made by the tensor cores and stay in registers; a tile's keys
// and values are copied while the one before it is computed.

#include <cuda_bf16.h>

#include <cstdint>

#include "attend_params.h"
#include "attend_tiles.cuh"
#include "decode_params.h"
#include "packed.cuh"
#include "ring.cuh"

namespace nanochat_x::cuda {

inline constexpr int kPromptShared = 4 * kTileBytes;  // two tiles of keys, two of values

// A warp's 16 queries.
class QueryTile {
 public:
  __device__ QueryTile(const AttendParams& p, const __nv_bfloat16* q, int first, int position)
      : position_{position + first + lane_ / 4, position + first + lane_ / 4 + 8}, window_(p.window) {
    const auto at = [&](int row, int column) {
      return *reinterpret_cast<const std::uint32_t*>(q + min(first + row, p.length - 1) * p.q_stride + column);
    };
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const int row = lane_ / 4, column = 16 * i + 2 * (lane_ % 4);
      q_[i] = make_uint4(at(row, column), at(row + 8, column), at(row, column + 8), at(row + 8, column + 8));
    }
  }

  // `masked`: some of these keys, the first of which is `first_key`, are not seen by some of the queries.
  __device__ void attend(std::uint32_t keys, std::uint32_t values, int first_key, bool masked) {
    float4 score[kKeyTile / 8] = {};
    multiply_keys(score, q_, keys);
    if (masked) mask(score, first_key);
    soften(score);
    multiply_values(out_, score, values);
  }

  // out: the row of this warp's first query, of `count` rows `stride` apart
  __device__ void store(__nv_bfloat16* out, int count, long long stride) const {
    const float inverse[2] = {1 / lanes_sum<4>(total_[0]), 1 / lanes_sum<4>(total_[1])};
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      const int row = lane_ / 4, column = 8 * i + 2 * (lane_ % 4);
      if (row < count) {
        *reinterpret_cast<std::uint32_t*>(out + row * stride + column) =
            pack(out_[i].x * inverse[0], out_[i].y * inverse[0]);
      }
      if (row + 8 < count) {
        *reinterpret_cast<std::uint32_t*>(out + (row + 8) * stride + column) =
            pack(out_[i].z * inverse[1], out_[i].w * inverse[1]);
      }
    }
  }

 private:
  __device__ void mask(float4 (&score)[kKeyTile / 8], int first_key) const {
#pragma unroll
    for (int i = 0; i < kKeyTile / 8; ++i) {
      const int key = first_key + 8 * i + 2 * (lane_ % 4);
      const auto sees = [&](int which, int other) {
        return other <= position_[which] && other >= position_[which] - window_;
      };
      if (!sees(0, key)) score[i].x = -INFINITY;
      if (!sees(0, key + 1)) score[i].y = -INFINITY;
      if (!sees(1, key)) score[i].z = -INFINITY;
      if (!sees(1, key + 1)) score[i].w = -INFINITY;
    }
  }

  // Scores to exponentials, below the largest score so far; what was summed before fades by that.
  __device__ void soften(float4 (&score)[kKeyTile / 8]) {
    float top[2] = {largest_[0], largest_[1]};
#pragma unroll
    for (const float4& s : score) {
      top[0] = fmaxf(top[0], fmaxf(s.x, s.y));
      top[1] = fmaxf(top[1], fmaxf(s.z, s.w));
    }
    float fade[2], shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = fmaxf(top[i], __shfl_xor_sync(~0U, top[i], 1));
      top[i] = fmaxf(top[i], __shfl_xor_sync(~0U, top[i], 2));
      shift[i] = top[i] == -INFINITY ? 0 : top[i] * kScoreScale;  // nothing seen yet: all exponentials are 0
      fade[i] = power_of_two(largest_[i] * kScoreScale - shift[i]);
      largest_[i] = top[i];
      total_[i] *= fade[i];
    }
#pragma unroll
    for (float4& s : score) {
      s = make_float4(power_of_two(s.x * kScoreScale - shift[0]), power_of_two(s.y * kScoreScale - shift[0]),
                      power_of_two(s.z * kScoreScale - shift[1]), power_of_two(s.w * kScoreScale - shift[1]));
      total_[0] += s.x + s.y;
      total_[1] += s.z + s.w;
    }
#pragma unroll
    for (float4& o : out_) o = make_float4(o.x * fade[0], o.y * fade[0], o.z * fade[1], o.w * fade[1]);
  }

  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  const int position_[2], window_;
  uint4 q_[kHeadDim / 16];
  float4 out_[kHeadDim / 8] = {};
  float largest_[2] = {-INFINITY, -INFINITY}, total_[2] = {};
};

// Grid: heads, rows of the cache, tiles of queries; those that see the most keys begin first.
__global__ void __launch_bounds__(kTileThreads, 3) attend_prompt(const __grid_constant__ AttendParams p) {
  extern __shared__ __align__(256) unsigned char shared[];
  const int head = static_cast<int>(blockIdx.x), row = static_cast<int>(blockIdx.y);
  const int first = static_cast<int>(gridDim.z - 1 - blockIdx.z) * kQueryTile;
  const int position = p.position[row];
  const long long from = row * p.cache_row + head / p.group * p.cache_head;
  const std::uint32_t memory = shared_address(shared);
  const int warp_first = first + static_cast<int>(threadIdx.x) / 32 * 16;
  const __nv_bfloat16* q = p.q + static_cast<long long>(row) * p.length * p.q_stride + head * kHeadDim;
  QueryTile queries(p, q, warp_first, position);

  const int end = min(position + min(first + kQueryTile, p.length), p.capacity);  // of the keys that are seen
  const int begin = max(0, position + first - p.window) / kKeyTile * kKeyTile;
  const auto load = [&](int key, int buffer) {
    const long long at = from + static_cast<long long>(key) * kHeadDim;
    load_tile(memory + 2 * buffer * kTileBytes, p.keys + at, end - key);
    load_tile(memory + (2 * buffer + 1) * kTileBytes, p.values + at, end - key);
    commit_copies();
  };
  load(begin, 0);
  int buffer = 0;
  for (int key = begin; key < end; key += kKeyTile, buffer ^= 1) {
    if (key + kKeyTile < end) {
      load(key + kKeyTile, buffer ^ 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    const bool masked = key + kKeyTile - 1 > position + warp_first || key < position + warp_first + 15 - p.window;
    queries.attend(memory + 2 * buffer * kTileBytes, memory + (2 * buffer + 1) * kTileBytes, key, masked);
    __syncthreads();
  }
  const long long width = static_cast<long long>(p.n_head) * kHeadDim;
  __nv_bfloat16* out = p.out + (static_cast<long long>(row) * p.length + warp_first) * width + head * kHeadDim;
  queries.store(out, p.length - warp_first, width);
}

}  // namespace nanochat_x::cuda
