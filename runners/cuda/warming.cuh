#pragma once

#include <cuda_bf16.h>

#include "decode_params.h"
#include "ring.cuh"

namespace nanochat_x::cuda {

// The keys and values that the attention behind some products begins with: they are brought into the L2 cache
// meanwhile.
struct Warming {
  const __nv_bfloat16 *keys, *values;  // [rows, n_kv_head, ., 128]
  long long cache_row, cache_head;     // in elements
  const int* position;                 // [rows]
  int rows, n_kv_head, window;
  int shared;  // leading keys that are not among them
  int most;    // keys of each head; 0: none
};

// By one thread of each of `blocks` blocks.
__device__ inline void warm(const Warming& w, int block, int blocks) {
  for (int item = block; item < w.rows * w.n_kv_head; item += blocks) {
    const int row = item / w.n_kv_head, position = w.position[row], first = max(w.shared, position - w.window);
    const int bytes = min(w.most, position - first) * kHeadDim * 2;
    const long long from =
        row * w.cache_row + item % w.n_kv_head * w.cache_head + static_cast<long long>(first) * kHeadDim;
    if (bytes == 0) continue;
    prefetch_bulk(w.keys + from, bytes);
    prefetch_bulk(w.values + from, bytes);
  }
}

}  // namespace nanochat_x::cuda
