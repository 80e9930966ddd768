#pragma once

// Pairs of bfloat16 in 32 bits, and reductions over a warp.

#include <cuda_bf16.h>

#include <cstdint>

namespace nanochat_x::cuda {

// Of each LANES lanes, a power of two, the sum; all of the warp take part.
template <int LANES>
__device__ float lanes_sum(float value) {
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) value += __shfl_xor_sync(~0U, value, distance);
  return value;
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0U, value, distance);
  return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(~0U, value, distance));
  return value;
}

__device__ inline float2 unpack(std::uint32_t two) {
  return make_float2(__uint_as_float(two << 16U), __uint_as_float(two & 0xffff0000U));
}

__device__ inline std::uint32_t pack(float a, float b) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const std::uint32_t*>(&two);
}

__device__ inline float sigmoid(float x) { return __fdividef(1, 1 + __expf(-x)); }

}  // namespace nanochat_x::cuda
