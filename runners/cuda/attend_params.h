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

}  // namespace nanochat_x::cuda
