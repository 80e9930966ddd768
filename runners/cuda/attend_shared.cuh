#pragma once

// Attention of a step of one token a row to the keys that all its rows have alike: rows that are samples of one prompt
// read that once, not once a row. A block takes one head's queries of 64 rows, a warp 16 of them, and goes through some
// of those keys in tiles of 64. What it sums is a part, to which attend_step, behind it, adds what each row has of its
// own: exponentials are taken without the largest score, as there.

#include <cuda_bf16.h>

#include <cstdint>

#include "attend_step.cuh"
#include "attend_tiles.cuh"
#include "barrier.cuh"
#include "dependent.cuh"
#include "head_vector.cuh"

namespace nanochat_x::cuda {

inline constexpr int kWarpQueries = 16;
inline constexpr int kQueryBytes = kQueryTile * kHeadDim * 2;

// Of a block that holds so many tiles of keys and of values at a time.
constexpr int shared_keys_bytes(int tiles) { return kQueryBytes + 2 * tiles * kTileBytes; }

class AttendShared {
 public:
  explicit __device__ AttendShared(const AttendStepParams& params)
      : p_(params), position_{position_of(first_row_ + lane_ / 4), position_of(first_row_ + lane_ / 4 + 8)} {
    choose_tiles();
  }

  __device__ void run() {
    allow_dependent();
    // Keys and values are there since earlier steps.
    if (tile_ < end_) load(tile_, 0);
    make_queries();
    for (int buffer = 0; tile_ < end_; ++tile_, buffer ^= 1) {
      if (tile_ + 1 < end_) {
        load(tile_ + 1, buffer ^ 1);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      __syncthreads();
      if (first_row_ < p_.rows) attend(tile_, buffer);
      __syncthreads();
    }
    if (first_row_ < p_.rows) store();
  }

 private:
  // Which of the tiles that some row of the block sees are this block's. Rows that are not there are the last one
  // again.
  __device__ void choose_tiles() {
    const int block_row = static_cast<int>(blockIdx.z) * kQueryTile;
    const int lowest = min(position_of(block_row + lane_), position_of(block_row + 32 + lane_));
    begin_ = max(0, __reduce_min_sync(~0U, lowest) - p_.attend.window);
    const int tiles = (max(0, p_.shared.count - begin_) + kKeyTile - 1) / kKeyTile;
    tile_ = tiles * chunk_ / p_.shared.chunks;
    end_ = tiles * (chunk_ + 1) / p_.shared.chunks;
  }

  __device__ int position_of(int row) const { return __ldg(p_.attend.position + min(row, p_.rows - 1)); }
  __device__ int first_key(int tile) const { return begin_ + tile * kKeyTile; }
  __device__ std::uint32_t keys_at(int buffer) const {
    return shared_address(shared_memory) + static_cast<unsigned>(kQueryBytes + 2 * buffer * kTileBytes);
  }

  // All rows have them: they are read from the first.
  __device__ void load(int tile, int buffer) const {
    const int first = first_key(tile), count = p_.shared.count - first;
    const long long from = head_ / p_.attend.group * p_.attend.cache_head + static_cast<long long>(first) * kHeadDim;
    load_tile(keys_at(buffer), p_.attend.keys + from, count);
    load_tile(keys_at(buffer) + kTileBytes, p_.attend.values + from, count);
    commit_copies();
  }

  // The warp's queries, normed, rotated and scaled as attend_step has them, as left operands of the tensor cores. Waits
  // for the kernel in front of this one.
  __device__ void make_queries() {
    const HeadParams& h = p_.heads;
    Rotary rotary[kWarpQueries];
#pragma unroll
    for (int i = 0; i < kWarpQueries; ++i) {
      const long long at = static_cast<long long>(position_of(first_row_ + i)) * (kHeadDim / 2);
      rotary[i] = Rotary::load(h.cos + at, h.sin + at);
    }
    await_dependence();
    HeadVector query[kWarpQueries];
#pragma unroll
    for (int i = 0; i < kWarpQueries; ++i) {
      query[i] = HeadVector::load(h.qkv + min(first_row_ + i, p_.rows - 1) * p_.attend.q_stride + head_ * kHeadDim);
    }
    const unsigned lane = threadIdx.x % 32, first = threadIdx.x / 32 * kWarpQueries;
#pragma unroll
    for (int i = 0; i < kWarpQueries; ++i) {
      query[i].scale(kScoreScale * query[i].rotate(rotary[i], h.norm_eps, h.qk_scale));
      const auto put = [&](unsigned chunk, float2 two) {
        *reinterpret_cast<std::uint32_t*>(shared_memory + tile_offset(first + i, chunk + lane / 4) + lane % 4 * 4) =
            pack(two.x, two.y);
      };
      put(0, query[i].a);
      put(kChunks / 2, query[i].b);
    }
    __syncwarp();
    const std::uint32_t own = shared_address(shared_memory) + tile_offset(first + lane % 16, lane / 16);
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) queries_[i] = load_matrices(own ^ (32U * i));
  }

  __device__ void attend(int tile, int buffer) {
    float4 weight[kKeyTile / 8] = {};
    multiply_keys(weight, queries_, keys_at(buffer));
    mask(weight, first_key(tile));
#pragma unroll
    for (float4& w : weight) {
      w = make_float4(power_of_two(w.x), power_of_two(w.y), power_of_two(w.z), power_of_two(w.w));
      total_[0] += w.x + w.y;
      total_[1] += w.z + w.w;
    }
    multiply_values(sum_, weight, keys_at(buffer) + kTileBytes);
  }

  // What lies in front of a query's window, or behind the common keys, is not seen.
  __device__ void mask(float4 (&score)[kKeyTile / 8], int first) const {
    const int begin[2] = {position_[0] - p_.attend.window - first, position_[1] - p_.attend.window - first};
    const int end = p_.shared.count - first;
    if (__all_sync(~0U, max(begin[0], begin[1]) <= 0) && end >= kKeyTile) return;
#pragma unroll
    for (int i = 0; i < kKeyTile / 8; ++i) {
      const int key = 8 * i + 2 * (lane_ % 4);
      const auto sees = [&](int which, int other) { return other >= begin[which] && other < end; };
      if (!sees(0, key)) score[i].x = -INFINITY;
      if (!sees(0, key + 1)) score[i].y = -INFINITY;
      if (!sees(1, key)) score[i].z = -INFINITY;
      if (!sees(1, key + 1)) score[i].w = -INFINITY;
    }
  }

  __device__ void store() const {
    const float total[2] = {lanes_sum<4>(total_[0]), lanes_sum<4>(total_[1])};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row_ + lane_ / 4 + 8 * half;
      if (row >= p_.rows || !p_.shared.is_seen(position_[half], p_.attend.window)) continue;
      float* to = p_.shared.part(chunk_, p_.rows, p_.attend.n_head, row, head_);
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        *reinterpret_cast<float2*>(to + 8 * i + 2 * (lane_ % 4)) =
            half == 0 ? make_float2(sum_[i].x, sum_[i].y) : make_float2(sum_[i].z, sum_[i].w);
      }
      if (lane_ % 4 == 0) to[kHeadDim] = total[half];
    }
  }

  const AttendStepParams& p_;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  const int chunk_ = static_cast<int>(blockIdx.x), head_ = static_cast<int>(blockIdx.y);
  const int first_row_ =  // of the warp's
      static_cast<int>(blockIdx.z) * kQueryTile + static_cast<int>(threadIdx.x) / 32 * kWarpQueries;
  const int position_[2];   // of the lane's rows
  int begin_, tile_, end_;  // the first key that a row sees; this block's tiles behind it
  uint4 queries_[kHeadDim / 16];
  float4 sum_[kHeadDim / 8] = {};
  float total_[2] = {};
};

// Grid: chunks, heads, tiles of rows.
__global__ void __launch_bounds__(kTileThreads, 3) attend_shared(const __grid_constant__ AttendStepParams p) {
  AttendShared(p).run();
}

}  // namespace nanochat_x::cuda
