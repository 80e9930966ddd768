#pragma once

// Four neighbouring elements of a row at a time, and the squares that rows are normed by.

#include <cstdint>

#include "packed.cuh"

namespace nanochat_x::cuda {

__device__ inline float4 operator*(float factor, float4 v) {
  return make_float4(factor * v.x, factor * v.y, factor * v.z, factor * v.w);
}
__device__ inline float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ inline float4 operator*(float4 a, float4 b) {
  return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
__device__ inline float squares_of(float4 v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }

__device__ inline float4 unpack4(uint2 bits) {
  const float2 low = unpack(bits.x), high = unpack(bits.y);
  return make_float4(low.x, low.y, high.x, high.y);
}
__device__ inline uint2 pack4(float4 v) { return make_uint2(pack(v.x, v.y), pack(v.z, v.w)); }

// Squares of rows, added up by parts: what products of a batch norm their rows by (batch_product.cuh).
struct RowSquares {
  static constexpr int kMost = 32;
  float* sums;  // [rows, kMost]
  int parts;    // that there are

  __device__ float* of(int row) const { return sums + row * kMost; }
};

}  // namespace nanochat_x::cuda
