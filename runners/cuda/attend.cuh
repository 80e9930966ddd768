#pragma once

// Attention of one token by the blocks of a cluster: each takes a run of the keys that one KV head's queries see (a
// split), the last one the new key too, which it makes and appends to the cache.
//
// Queries and keys are normed, so that no score is beyond a bound that the model's constants give (why_not in
// decoder.cu): exponentials are taken as they are, without the largest score, and parts are added up as they are.

#include <cuda_bf16.h>

#include <cstdint>

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

// Lane l's angles: channels 2 l and 2 l + 1 of 64.
struct Rotary {
  float2 cos, sin;
};

// A head's 128 values. Lane l has dims 2 l, 2 l + 1 and those 64 behind: a and b.
struct HeadVector {
  float2 a, b;

  __device__ static HeadVector load(const float* from) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return {*reinterpret_cast<const float2*>(from + 2 * lane),
            *reinterpret_cast<const float2*>(from + kHeadDim / 2 + 2 * lane)};
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

  // To global memory as bfloat16, and rounds this to what is there.
  __device__ void append(__nv_bfloat16* to) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const std::uint32_t low = pack(a.x, a.y), high = pack(b.x, b.y);
    reinterpret_cast<std::uint32_t*>(to)[lane] = low;
    reinterpret_cast<std::uint32_t*>(to)[kHeadDim / 4 + lane] = high;
    a = unpack(low);
    b = unpack(high);
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
__device__ void halve(float (&sums)[kLaneDims], int distance) {
  const bool upper = static_cast<int>(threadIdx.x) & distance;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float kept = upper ? sums[N / 2 + i] : sums[i], given = upper ? sums[i] : sums[N / 2 + i];
    sums[i] = kept + __shfl_xor_sync(~0U, given, distance);
  }
}

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
