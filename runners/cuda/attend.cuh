#pragma once

// Attention of one token by the blocks of a cluster: each takes a run of the keys that one KV head's queries see (a
// split), the last one the new key too, which it makes and appends to the cache.
//
// Queries and keys are normed, so that no score is beyond a bound that the model's constants give (why_not in
// decoder.cu): exponentials are taken as they are, without the largest score, and parts are added up as they are.

#include <cuda_bf16.h>

#include <cstdint>

#include "head_vector.cuh"
#include "packed.cuh"
#include "sums.cuh"

namespace nanochat_x::cuda {

inline constexpr int kKeyLanes = 8;                         // lanes of one key
inline constexpr int kLaneDims = kHeadDim / kKeyLanes;      // of them, in each
inline constexpr int kKeysAtOnce = kConsumers / kKeyLanes;  // by all consumers
inline constexpr int kNewKeyWarp = kConsumerWarps - 1;      // which makes the new key and value

struct AttentionMemory {
  alignas(16) float query[kConsumerWarps][kHeadDim];    // each warp makes its own
  alignas(16) float sum[kConsumerWarps + 1][kHeadDim];  // of values, by warp; the last: of the new one
  alignas(16) float weight[kConsumerWarps + 1];         // sums of exponentials
};

// The keys of a row that one block of a cluster attends to: each rank takes a run of them, the last the new one too.
struct Split {
  int first, count;  // first may be any if there are none
  bool has_new;

  __device__ Split(int position, int window, int rank) {
    const int begin = max(0, position - window), all = position - begin;
    const int length = (all + kRanks - 1) / kRanks, skipped = min(rank * length, all);
    first = begin + skipped;
    count = min(length, all - skipped);
    has_new = rank == kRanks - 1;
  }
};

// A lane's part of a key or a value: 16 dims.
struct LaneDims {
  uint4 low, high;

  // Of the one of number `which` from `first` on.
  __device__ void load(const __nv_bfloat16* first, int which) {
    const auto* from = reinterpret_cast<const uint4*>(first + static_cast<long long>(which) * kHeadDim +
                                                      kLaneDims * (static_cast<int>(threadIdx.x) % kKeyLanes));
    low = __ldcg(from);
    high = __ldcg(from + 1);
  }
};

// Adds up this warp's keys of `count` for one query, which is in `memory.query`, into `memory.sum`. key, value: the
// first ones, as loaded; a lane without one has any. factor: of the scores.
__device__ inline void attend(AttentionMemory& memory, LaneDims key, LaneDims value, const __nv_bfloat16* keys,
                              const __nv_bfloat16* values, int count, float factor) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  float out[kLaneDims] = {};
  float total = 0;
  if (4 * warp < count) {
    const float* query = memory.query[warp] + kLaneDims * (lane % kKeyLanes);
    for (int begin = 0;; begin += kKeysAtOnce) {
      const int which = begin + thread / kKeyLanes, next = min(which + kKeysAtOnce, count - 1);
      const bool more = begin + kKeysAtOnce + 4 * warp < count;  // the same in all of the warp
      const float score = lanes_sum<kKeyLanes>(dot8(key.low, query) + dot8(key.high, query + 8));
      if (more) key.load(keys, next);
      const float weight = which < count ? exp2f(score * factor) : 0.0F;
      total += weight;
      add8(out, weight, value.low);
      add8(out + 8, weight, value.high);
      if (!more) break;
      value.load(values, next);
    }
    halve<kLaneDims>(out, 16);
    halve<kLaneDims / 2>(out, 8);
    total += __shfl_xor_sync(~0U, total, 16);
    total += __shfl_xor_sync(~0U, total, 8);
  }
  const int dims = kLaneDims * (lane % kKeyLanes) + (lane & 16 ? 8 : 0) + (lane & 8 ? 4 : 0);
  *reinterpret_cast<float4*>(&memory.sum[warp][dims]) = make_float4(out[0], out[1], out[2], out[3]);
  if (lane == 0) memory.weight[warp] = total;
}

}  // namespace nanochat_x::cuda
