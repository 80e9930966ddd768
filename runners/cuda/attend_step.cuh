#pragma once

// Attention of a step of one token a row: as attend_tokens.cuh, but a block makes its query from what the product gave,
// and the one with the last keys the new key and value too, which it appends to the cache.

#include <cuda_bf16.h>

#include <cstdint>

#include "attend_tokens.cuh"
#include "dependent.cuh"
#include "row_kernels.cuh"

namespace nanochat_x::cuda {

struct AttendStepParams {
  HeadParams heads;
  AttendParams attend;
};

// A head in the registers of eight lanes: lane l has dims 16 (l % 8) and on.
struct EightLanes {
  float v[16];

  __device__ void load(const __nv_bfloat16* head) {
    Sixteen raw;
    raw.load(head + threadIdx.x % 8 * 16);
    raw.each([&](int i, float2 two) {
      v[2 * i] = two.x;
      v[2 * i + 1] = two.y;
    });
  }

  // Rotary embedding of a position, whose angles' cos and sin are given, then norm and scale.
  __device__ void rotate_and_norm(const float* cos, const float* sin, float eps, float scale) {
    const float sign = threadIdx.x % 8 < 4 ? 1.0F : -1.0F;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int angle = static_cast<int>(threadIdx.x % 4) * 16 + i;
      const float other = __shfl_xor_sync(~0U, v[i], 4);  // 64 dims away
      v[i] = v[i] * cos[angle] + sign * other * sin[angle];
      squares += v[i] * v[i];
    }
    multiply(scale * rsqrtf(lanes_sum<8>(squares) * (1.0F / kHeadDim) + eps));
  }

  __device__ void multiply(float factor) {
#pragma unroll
    for (float& value : v) value *= factor;
  }

  // Rounds to bfloat16, and puts that to `to` if this warp is to write it.
  __device__ void append(__nv_bfloat16* to, bool writes) {
    std::uint32_t two[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      two[i] = pack(v[2 * i], v[2 * i + 1]);
      const float2 rounded = unpack(two[i]);
      v[2 * i] = rounded.x;
      v[2 * i + 1] = rounded.y;
    }
    if (!writes || threadIdx.x % 32 >= 8) return;
    auto* at = reinterpret_cast<uint4*>(to + threadIdx.x % 8 * 16);
    at[0] = make_uint4(two[0], two[1], two[2], two[3]);
    at[1] = make_uint4(two[4], two[5], two[6], two[7]);
  }
};

// v += gate * value_embed[token]
__device__ inline void add_value_embed(EightLanes& value, const HeadParams& h, int row, int kv_head) {
  float gate = 0;
  for (int channel = static_cast<int>(threadIdx.x) % 8; channel < h.gate_channels; channel += 8) {
    gate += __bfloat162float(h.normed[static_cast<long long>(row) * h.n_embd + channel]) *
            h.ve_gate[kv_head * h.gate_channels + channel];
  }
  gate = h.gate_scale * sigmoid(lanes_sum<8>(gate));
  EightLanes embed;
  embed.load(h.value_embed + (static_cast<long long>(h.tokens.token[row]) * h.n_kv_head + kv_head) * kHeadDim);
#pragma unroll
  for (int i = 0; i < 16; ++i) value.v[i] += gate * embed.v[i];
}

// Has the first keys and values that this block reads brought into the L2 cache; they are there since earlier steps.
__device__ inline void prefetch_keys(const __nv_bfloat16* keys, const __nv_bfloat16* values, int count) {
  if (threadIdx.x != 0 || count <= 0) return;
  for (const __nv_bfloat16* from : {keys, values}) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(min(count, 64) * kHeadDim * 2)
                 : "memory");
  }
}

// Grid: pieces, heads, rows.
__global__ void __launch_bounds__(kTokenThreads) attend_step(const __grid_constant__ AttendStepParams p) {
  const HeadParams& h = p.heads;
  const AttendParams& a = p.attend;
  const int piece = static_cast<int>(blockIdx.x), pieces = static_cast<int>(gridDim.x);
  const int head = static_cast<int>(blockIdx.y), row = static_cast<int>(blockIdx.z), kv_head = head / a.group;
  const int position = a.position[row];
  const int first = max(0, position - a.window), count = position - first;  // without the new one
  const int each = (count + pieces - 1) / pieces;
  const int begin = first + min(piece * each, count), end = min(begin + each, position);
  const long long from = row * a.cache_row + kv_head * a.cache_head;
  const __nv_bfloat16 *keys = a.keys + from, *values = a.values + from;
  allow_dependent();
  prefetch_keys(keys + static_cast<long long>(begin) * kHeadDim, values + static_cast<long long>(begin) * kHeadDim,
                end - begin);
  await_dependence();

  const __nv_bfloat16* raw = h.qkv + static_cast<long long>(row) * a.q_stride;
  const float *cos = h.cos + position * (kHeadDim / 2), *sin = h.sin + position * (kHeadDim / 2);
  EightLanes query;
  query.load(raw + head * kHeadDim);
  query.rotate_and_norm(cos, sin, h.norm_eps, h.qk_scale);
  query.multiply(kScoreScale);
  WarpPart part;
  if (piece == pieces - 1 && threadIdx.x < 32) {
    const bool writes = head % a.group == 0;  // the first of the KV head's queries
    const long long at = from + static_cast<long long>(position) * kHeadDim;
    EightLanes fresh;
    fresh.load(raw + (h.n_head + kv_head) * kHeadDim);
    fresh.rotate_and_norm(cos, sin, h.norm_eps, h.qk_scale);
    fresh.append(h.keys + at, writes);
    float score = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) score += fresh.v[i] * query.v[i];
    part.largest = lanes_sum<8>(score);
    fresh.load(raw + (h.n_head + h.n_kv_head + kv_head) * kHeadDim);
    if (h.value_embed != nullptr) add_value_embed(fresh, h, row, kv_head);
    fresh.append(h.values + at, writes);
    if (threadIdx.x < 8) {
      part.total = 1;
#pragma unroll
      for (int i = 0; i < 16; ++i) part.out[i] = fresh.v[i];
    }
  }
  part.attend(query.v, keys, values, begin, end);
  write_query(a, part, row, head, piece, pieces);
}

}  // namespace nanochat_x::cuda
