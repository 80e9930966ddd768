#pragma once

#include <cuda_bf16.h>

namespace nanochat_x::cuda {

/// What attention over many queries takes. Query `row` is token row % length of row row / length of the cache; its keys
/// and values, itself included, are in the cache already.
struct AttendParams {
  const __nv_bfloat16* q;  // [rows * length, q_stride]: a head's 128 dims behind another's
  const __nv_bfloat16 *keys, *values;
  long long q_stride, cache_row, cache_head;    // in elements
  const int* position;                          // [rows]: of each first token
  int length, capacity, n_head, group, window;  // group: query heads of one KV head
  __nv_bfloat16* out;                           // [rows * length, n_head * 128]
  float* parts;                                 // [rows * length, n_head, splits, kPartStride] where the keys are split
};

/// Floats of a part of a query's attention: 128 sums of values, behind them the sum of exponentials, or the largest
/// score and that.
inline constexpr int kPartStride = 128 + 4;

/// The leading keys that a step's rows have alike, which are attended to for all rows together (attend_shared.cuh).
struct SharedKeys {
  int count = 0;           // 0: none
  int chunks = 0;          // parts that they are attended to in
  float* parts = nullptr;  // [chunks, rows, n_head, kPartStride]

  // Whether the query at a position, behind them, sees any.
  __host__ __device__ bool is_seen(int position, int window) const { return position - window < count; }
  __host__ __device__ float* part(int chunk, int rows, int n_head, int row, int head) const {
    return parts + ((static_cast<long long>(chunk) * rows + row) * n_head + head) * kPartStride;
  }
};

}  // namespace nanochat_x::cuda
