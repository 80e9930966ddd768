#pragma once

// A head's query, key or value in the registers of a warp, and rotary embedding.

#include <cuda_bf16.h>

#include <cstdint>

#include "decode_params.h"
#include "packed.cuh"

namespace nanochat_x::cuda {

// Lane l's angles: channels 2 l and 2 l + 1 of 64.
struct Rotary {
  float2 cos, sin;

  // Of a position, whose 64 cos and sin are given.
  __device__ static Rotary load(const float* cos, const float* sin) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return {reinterpret_cast<const float2*>(cos)[lane], reinterpret_cast<const float2*>(sin)[lane]};
  }
};

// A head's 128 values. Lane l has dims 2 l, 2 l + 1 and those 64 behind: a and b.
struct HeadVector {
  float2 a, b;

  __device__ static HeadVector load(const float* from) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return {*reinterpret_cast<const float2*>(from + 2 * lane),
            *reinterpret_cast<const float2*>(from + kHeadDim / 2 + 2 * lane)};
  }
  __device__ static HeadVector load(const __nv_bfloat16* from) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const auto* two = reinterpret_cast<const std::uint32_t*>(from);
    return {unpack(two[lane]), unpack(two[kHeadDim / 4 + lane])};
  }

  // this += share * other
  __device__ void add(float share, const HeadVector& other) {
    a = make_float2(a.x + share * other.a.x, a.y + share * other.a.y);
    b = make_float2(b.x + share * other.b.x, b.y + share * other.b.y);
  }

  // Returns by what it is to be multiplied to be normed and scaled.
  __device__ float rotate(const Rotary& rotary, float eps, float scale) {
    const float2 old_a = a, old_b = b;
    a = make_float2(old_a.x * rotary.cos.x + old_b.x * rotary.sin.x, old_a.y * rotary.cos.y + old_b.y * rotary.sin.y);
    b = make_float2(old_b.x * rotary.cos.x - old_a.x * rotary.sin.x, old_b.y * rotary.cos.y - old_a.y * rotary.sin.y);
    return scale * rsqrtf(warp_sum(dot(*this)) * (1.0F / kHeadDim) + eps);
  }
  __device__ void scale(float factor) {
    a = make_float2(a.x * factor, a.y * factor);
    b = make_float2(b.x * factor, b.y * factor);
  }
  // The lane's part of it.
  __device__ float dot(const HeadVector& other) const {
    return a.x * other.a.x + a.y * other.a.y + b.x * other.b.x + b.y * other.b.y;
  }

  __device__ void store(float* to) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    *reinterpret_cast<float2*>(to + 2 * lane) = a;
    *reinterpret_cast<float2*>(to + kHeadDim / 2 + 2 * lane) = b;
  }

  // Rounds to bfloat16, and puts that to global memory if this warp is to write it.
  __device__ void append(__nv_bfloat16* to, bool writes = true) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const std::uint32_t low = pack(a.x, a.y), high = pack(b.x, b.y);
    if (writes) {
      reinterpret_cast<std::uint32_t*>(to)[lane] = low;
      reinterpret_cast<std::uint32_t*>(to)[kHeadDim / 4 + lane] = high;
    }
    a = unpack(low);
    b = unpack(high);
  }
};

// Of eight elements of a key, and eight of a query; eight elements of a value.
__device__ inline float dot8(const uint4& packed, const float* other) {
  const float4 low = *reinterpret_cast<const float4*>(other), high = *reinterpret_cast<const float4*>(other + 4);
  const float2 a = unpack(packed.x), b = unpack(packed.y), c = unpack(packed.z), d = unpack(packed.w);
  return (a.x * low.x + a.y * low.y + b.x * low.z + b.y * low.w) +
         (c.x * high.x + c.y * high.y + d.x * high.z + d.y * high.w);
}

__device__ inline void add8(float* sums, float weight, const uint4& packed) {
  const std::uint32_t two[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 values = unpack(two[i]);
    sums[2 * i] += weight * values.x;
    sums[2 * i + 1] += weight * values.y;
  }
}

// Half of a lane's sums, with those of the lane that has the other half: N become N / 2.
template <int N>
__device__ void halve(float (&sums)[16], int distance) {
  const bool upper = static_cast<int>(threadIdx.x) & distance;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float kept = upper ? sums[N / 2 + i] : sums[i], given = upper ? sums[i] : sums[N / 2 + i];
    sums[i] = kept + __shfl_xor_sync(~0U, given, distance);
  }
}

}  // namespace nanochat_x::cuda
