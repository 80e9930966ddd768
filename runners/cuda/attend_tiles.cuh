#pragma once

// Attention on the tensor cores: tiles of 64 queries, and of 64 keys or values, as they lie in shared memory and as a
// warp multiplies them, 16 queries a warp.

#include <cuda_bf16.h>

#include <cstdint>

#include "decode_params.h"
#include "packed.cuh"

namespace nanochat_x::cuda {

inline constexpr int kQueryTile = 64, kKeyTile = 64, kTileThreads = 128;  // a warp has 16 queries
inline constexpr int kChunks = kHeadDim / 8;                              // of 16 bytes, in a key
inline constexpr int kTileBytes = kKeyTile * kHeadDim * 2;                // of keys or of values

// Where chunk `chunk` of key `key` lies in a tile: eight keys' equal chunks are in different banks.
__device__ inline std::uint32_t tile_offset(unsigned key, unsigned chunk) {
  return key * (kHeadDim * 2) + (chunk ^ (key % 8)) * 16;
}

// 16 bytes, or zeros if not `there`.
__device__ inline void copy_async(std::uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// A tile whose first key is at `from`; keys from `count` on are zeros.
__device__ inline void load_tile(std::uint32_t to, const __nv_bfloat16* from, int count) {
  constexpr unsigned kRound = kTileThreads / kChunks;  // keys that are copied at a time; a multiple of 8
  const unsigned first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  to += tile_offset(first, chunk);
  from += first * kHeadDim + chunk * 8;
#pragma unroll
  for (unsigned i = 0; i < kKeyTile / kRound; ++i) {
    const bool there = static_cast<int>(first + i * kRound) < count;
    copy_async(to + i * kRound * kHeadDim * 2, from + (there ? i * kRound * kHeadDim : 0), there);
  }
}

// Four 8 x 8 matrices whose rows lie at the lanes' addresses: lane l has the address of row l % 8 of matrix l / 8.
__device__ inline uint4 load_matrices(std::uint32_t address) {
  uint4 m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
               : "r"(address)
               : "memory");
  return m;
}
__device__ inline uint4 load_transposed(std::uint32_t address) {
  uint4 m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
               : "r"(address)
               : "memory");
  return m;
}

// 2^x; what would be denormal is 0, which exp2f takes three more instructions not to say.
__device__ inline float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// sum += a * b: 16 x 16 times 16 x 8
__device__ inline void multiply_tile(float4& sum, const uint4& a, std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum.x), "+f"(sum.y), "+f"(sum.z), "+f"(sum.w)
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Bytes of 16 keys. Tiles begin at multiples of 256 bytes: bits 5 to 7 of an address are its chunk's alone.
inline constexpr std::uint32_t kSixteen = 16 * kHeadDim * 2;

// Scores of a warp's 16 queries, which are left operands. Lane l has rows l / 4 (x, y of each float4) and 8 behind it
// (z, w), columns 2 (l % 4) and on of every 8; of the sums of values too.
__device__ inline void multiply_keys(float4 (&score)[kKeyTile / 8], const uint4 (&queries)[kHeadDim / 16],
                                     std::uint32_t keys) {
  const unsigned lane = threadIdx.x % 32;
  const std::uint32_t own = keys + tile_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
    for (int pair = 0; pair < kKeyTile / 16; ++pair) {
      const uint4 k = load_matrices((own ^ (32U * i)) + pair * kSixteen);
      multiply_tile(score[2 * pair], queries[i], k.x, k.y);
      multiply_tile(score[2 * pair + 1], queries[i], k.z, k.w);
    }
  }
}

// sums += the weighted values
__device__ inline void multiply_values(float4 (&sums)[kHeadDim / 8], const float4 (&weight)[kKeyTile / 8],
                                       std::uint32_t values) {
  const unsigned lane = threadIdx.x % 32;
  const std::uint32_t own = values + tile_offset(lane / 8 % 2 * 8 + lane % 8, lane / 16);
#pragma unroll
  for (int i = 0; i < kKeyTile / 16; ++i) {
    const float4 &low = weight[2 * i], &high = weight[2 * i + 1];
    const uint4 a = make_uint4(pack(low.x, low.y), pack(low.z, low.w), pack(high.x, high.y), pack(high.z, high.w));
#pragma unroll
    for (int pair = 0; pair < kHeadDim / 16; ++pair) {
      const uint4 v = load_transposed((own ^ (32U * pair)) + i * kSixteen);
      multiply_tile(sums[2 * pair], a, v.x, v.y);
      multiply_tile(sums[2 * pair + 1], a, v.z, v.w);
    }
  }
}

}  // namespace nanochat_x::cuda
