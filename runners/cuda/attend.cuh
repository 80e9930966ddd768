#pragma once

// Attention of one token: a block takes a run of the keys that one KV head's queries see (a split), the block of the
// last split the new key too, which it makes and appends to the cache.

#include <cuda_bf16.h>

#include <cstdint>

#include "exchange.cuh"
#include "packed.cuh"
#include "product.cuh"

namespace nanochat_x::cuda {

struct AttentionMemory {
  alignas(16) float query[kConsumerWarps][kHeadDim];  // each warp makes its own
  alignas(16) float value[kHeadDim];                  // the new token's
  alignas(16) float key[kHeadDim];
  alignas(16) float sum[kConsumerWarps][kHeadDim];
  float score[kSplitKeys + 1];  // the last: the new key's
};

// Where the splits of a row's keys lie.
struct Splits {
  int first, count, pieces, length;  // first key, keys, splits, keys of a split (the last may have fewer)

  __device__ Splits(int position, int window, int most) {
    first = max(0, position - window);
    count = position - first;
    pieces = max(1, min(most, (count + kSplitKeys - 1) / kSplitKeys));
    length = (count + pieces - 1) / pieces;
  }
};

// Lane l's angles: channels 2 l and 2 l + 1 of 64.
struct Rotary {
  float2 cos, sin;
};

// Waits for a head's 128 raw values, rotates them, norms them and scales them. Lane l has dims 2 l, 2 l + 1 and those
// 64 behind: a and b.
struct HeadVector {
  float2 a, b;

  // Two at once: the way to the L2 cache and back is long.
  __device__ static void await_raw(HeadVector& one, const Word* one_from, HeadVector& other, const Word* other_from,
                                   unsigned flag) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    WordPair pairs[4] = {};
    do {
      pairs[0] = load_pair(one_from + 2 * lane);
      pairs[1] = load_pair(one_from + kHeadDim / 2 + 2 * lane);
      pairs[2] = load_pair(other_from + 2 * lane);
      pairs[3] = load_pair(other_from + kHeadDim / 2 + 2 * lane);
    } while (!(pairs[0].has(flag) && pairs[1].has(flag) && pairs[2].has(flag) && pairs[3].has(flag)));
    __syncwarp();
    one = {make_float2(pairs[0].first(), pairs[0].second()), make_float2(pairs[1].first(), pairs[1].second())};
    other = {make_float2(pairs[2].first(), pairs[2].second()), make_float2(pairs[3].first(), pairs[3].second())};
  }

  // this += share * other
  __device__ void add(float share, const HeadVector& other) {
    a = make_float2(a.x + share * other.a.x, a.y + share * other.a.y);
    b = make_float2(b.x + share * other.b.x, b.y + share * other.b.y);
  }

  __device__ void rotate_and_norm(const Rotary& rotary, float eps, float scale) {
    const float2 old_a = a, old_b = b;
    a = make_float2(old_a.x * rotary.cos.x + old_b.x * rotary.sin.x, old_a.y * rotary.cos.y + old_b.y * rotary.sin.y);
    b = make_float2(old_b.x * rotary.cos.x - old_a.x * rotary.sin.x, old_b.y * rotary.cos.y - old_a.y * rotary.sin.y);
    const float squares = warp_sum(a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y);
    const float factor = scale * rsqrtf(squares * (1.0F / kHeadDim) + eps);
    a = make_float2(a.x * factor, a.y * factor);
    b = make_float2(b.x * factor, b.y * factor);
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

// kSplitKeys keys of a split, and their values, as a thread needs them.
struct KeyBlock {
  uint4 keys[kSplitKeys / 32][2];  // thread's key: 32 * i + thread / 8; dims 16 * (thread % 8) and on
  uint4 values[kSplitKeys / 16];   // thread's key: 16 * i + thread / 16; dims 8 * (thread % 16) and on

  // `keys_from`: the first key, of `count` (the rest reads the last one again, or nothing if there is none).
  __device__ void load(const __nv_bfloat16* keys_from, const __nv_bfloat16* values_from, int count) {
    const int thread = static_cast<int>(threadIdx.x);
    if (count <= 0) return;
#pragma unroll
    for (int i = 0; i < kSplitKeys / 32; ++i) {
      if (32 * i < count) {
        const auto* from = reinterpret_cast<const uint4*>(keys_from + min(32 * i + thread / 8, count - 1) * kHeadDim +
                                                          16 * (thread % 8));
        keys[i][0] = __ldcg(from);
        keys[i][1] = __ldcg(from + 1);
      }
    }
#pragma unroll
    for (int i = 0; i < kSplitKeys / 16; ++i) {
      if (16 * i < count) {
        values[i] = __ldcg(reinterpret_cast<const uint4*>(
            values_from + min(16 * i + thread / 16, count - 1) * kHeadDim + 8 * (thread % 16)));
      }
    }
  }
};

__device__ inline float dot8(const uint4& packed, const float* other) {
  const float4 low = *reinterpret_cast<const float4*>(other), high = *reinterpret_cast<const float4*>(other + 4);
  const float2 a = unpack(packed.x), b = unpack(packed.y), c = unpack(packed.z), d = unpack(packed.w);
  return a.x * low.x + a.y * low.y + b.x * low.z + b.y * low.w + c.x * high.x + c.y * high.y + d.x * high.z +
         d.y * high.w;
}

// One query against a split's keys, and the new one if `has_new`; writes the split's part of the head's output and its
// weight. keys_from, values_from: the split's first. `block` holds what was loaded of them already.
__device__ inline void attend(AttentionMemory& memory, const HeadVector& query, KeyBlock& block,
                              const __nv_bfloat16* keys_from, const __nv_bfloat16* values_from, int count, bool has_new,
                              Word* partial, Word* lse, int copy_stride, unsigned flag) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  float* own = memory.query[warp];
  query.store(own);
  __syncwarp();
  float largest = -INFINITY, total = 0;
  float out[8] = {};
  for (int begin = 0; begin == 0 || begin < count; begin += kSplitKeys) {
    if (begin > 0) {
      block.load(keys_from + static_cast<long long>(begin) * kHeadDim,
                 values_from + static_cast<long long>(begin) * kHeadDim, count - begin);
      consumers_sync();  // the scores of the block before have been read
    }
    const int here = min(kSplitKeys, count - begin);
#pragma unroll
    for (int i = 0; i < kSplitKeys / 32; ++i) {
      if (32 * i < here) {
        const float* dims = own + 16 * (thread % 8);
        float score = dot8(block.keys[i][0], dims) + dot8(block.keys[i][1], dims + 8);
        score = lanes_sum<8>(score);
        if (thread % 8 == 0 && 32 * i + thread / 8 < here) memory.score[32 * i + thread / 8] = score * kScoreScale;
      }
    }
    const bool with_new = has_new && begin == 0;
    if (with_new && warp == kConsumerWarps - 1) {  // the warp that made the key
      const float2 ka = *reinterpret_cast<const float2*>(memory.key + 2 * lane);
      const float2 kb = *reinterpret_cast<const float2*>(memory.key + kHeadDim / 2 + 2 * lane);
      const float score = warp_sum(ka.x * query.a.x + ka.y * query.a.y + kb.x * query.b.x + kb.y * query.b.y);
      if (lane == 0) memory.score[kSplitKeys] = score * kScoreScale;
    }
    consumers_sync();
    // Every warp looks at all scores: a reduction between warps would take another barrier.
    float top = with_new ? memory.score[kSplitKeys] : -INFINITY;
#pragma unroll
    for (int i = 0; i < kSplitKeys / 32; ++i) {
      if (32 * i + lane < here) top = fmaxf(top, memory.score[32 * i + lane]);
    }
    const float before = largest;
    largest = fmaxf(largest, warp_max(top));
    const float fade = exp2f(before - largest);  // 0 at first
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kSplitKeys / 32; ++i) {
      if (32 * i + lane < here) sum += exp2f(memory.score[32 * i + lane] - largest);
    }
    total = total * fade + warp_sum(sum);
#pragma unroll
    for (float& value : out) value *= fade;
#pragma unroll
    for (int i = 0; i < kSplitKeys / 16; ++i) {
      const int key = 16 * i + thread / 16;
      if (key < here) {
        const float weight = exp2f(memory.score[key] - largest);
        const std::uint32_t packed[4] = {block.values[i].x, block.values[i].y, block.values[i].z, block.values[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 two = unpack(packed[j]);
          out[2 * j] += weight * two.x;
          out[2 * j + 1] += weight * two.y;
        }
      }
    }
    if (with_new) {
      const float weight = exp2f(memory.score[kSplitKeys] - largest);
      total += weight;
      if (thread < 16) {
#pragma unroll
        for (int j = 0; j < 8; ++j) out[j] += weight * memory.value[8 * thread + j];
      }
    }
  }
#pragma unroll
  for (float& value : out) value += __shfl_xor_sync(~0U, value, 16);
  if (lane < 16) {
    float4* to = reinterpret_cast<float4*>(&memory.sum[warp][8 * lane]);
    to[0] = make_float4(out[0], out[1], out[2], out[3]);
    to[1] = make_float4(out[4], out[5], out[6], out[7]);
  }
  consumers_sync();
  const int pair = thread % (kHeadDim / 2);
  float a = 0, b = 0;
#pragma unroll
  for (int other = 0; other < kConsumerWarps; ++other) {
    const float2 two = *reinterpret_cast<const float2*>(&memory.sum[other][2 * pair]);
    a += two.x;
    b += two.y;
  }
  const float inverse = 1 / total;
  const float own_lse = largest + log2f(total);
  for (int copy = thread / (kHeadDim / 2); copy < kCopies; copy += kConsumers / (kHeadDim / 2)) {
    store_word(partial + copy * copy_stride + pair, pack(a * inverse, b * inverse), flag);
    if (pair == 0) store_word(lse + copy * copy_stride, own_lse, flag);
  }
}

}  // namespace nanochat_x::cuda
