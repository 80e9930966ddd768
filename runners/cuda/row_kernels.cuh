#pragma once

// What lies between the products of a pass over many tokens. A token is a row of every array here; a block of
// kRowThreads computes a row, of which a thread has the four elements from 4 (t + kRowThreads i) on.

#include <cuda_bf16.h>

#include <cstdint>

#include "decode_params.h"
#include "dependent.cuh"
#include "packed.cuh"
#include "quads.cuh"

namespace nanochat_x::cuda {

inline constexpr int kRowThreads = 128, kRowQuads = 4;    // up to 2048 columns
inline constexpr int kHeadLanes = 16, kHeadsAtOnce = 16;  // lanes that prepare a head, heads of a block

// Which tokens a pass computes: `length` for each of some rows of the cache. Device memory.
struct PassTokens {
  const int *token, *previous;  // [rows * length]: the token, and the one before it in its sequence
  const int* position;          // [rows]: of the first token of each
  int length;

  __device__ int position_of(int row) const { return position[row / length] + row % length; }
};

// The sum over a block's threads, in each of them.
__device__ inline float row_sum(float value) {
  __shared__ float parts[kRowThreads / 32];
  value = warp_sum(value);
  __syncthreads();  // the parts of the sum before have been read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (float part : parts) total += part;
  return total;
}

// work(i, quad): for each of the thread's quads of a row.
template <typename Work>
__device__ void for_quads(int n_embd, Work work) {
#pragma unroll
  for (int i = 0; i < kRowQuads; ++i) {
    const int quad = static_cast<int>(threadIdx.x) + i * kRowThreads;
    if (4 * quad < n_embd) work(i, quad);
  }
}

struct EmbedParams {
  PassTokens tokens;
  int n_embd;
  const __nv_bfloat16* wte;
  float inverse_width, norm_eps;
  int smear_channels;  // 0: none
  const float* smear_gate;
  float smear_lambda;
  float *x, *x0;           // [rows, n_embd]
  float own;               // x is so many times x0
  __nv_bfloat16* rounded;  // gets x; null: none
  RowSquares squares;      // get those of x, with `rounded`
};

// x0 = norm(wte[token]), with a share of the normed row of the token before
__global__ void __launch_bounds__(kRowThreads) embed_rows(const __grid_constant__ EmbedParams p) {
  const int row = static_cast<int>(blockIdx.x);
  const long long width = p.n_embd;
  const auto* from = reinterpret_cast<const uint2*>(p.wte + p.tokens.token[row] * width);
  const auto* before_from = reinterpret_cast<const uint2*>(p.wte + p.tokens.previous[row] * width);
  const bool smear = p.smear_channels > 0 && p.tokens.position_of(row) > 0;
  float4 x[kRowQuads] = {}, before[kRowQuads] = {};
  float squares = 0, before_squares = 0, gate = 0;
  for_quads(p.n_embd, [&](int i, int quad) {
    x[i] = unpack4(from[quad]);
    squares += squares_of(x[i]);
    if (!smear) return;
    before[i] = unpack4(before_from[quad]);
    before_squares += squares_of(before[i]);
    const float elements[] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (4 * quad + j < p.smear_channels) gate += elements[j] * p.smear_gate[4 * quad + j];
    }
  });
  const float factor = rsqrtf(row_sum(squares) * p.inverse_width + p.norm_eps);
  float share = 0;
  if (smear) {
    share = p.smear_lambda * sigmoid(row_sum(gate) * factor) *
            rsqrtf(row_sum(before_squares) * p.inverse_width + p.norm_eps);
  }
  for_quads(p.n_embd, [&](int i, int quad) {
    const float4 value = factor * x[i] + share * before[i];
    x[i] = p.own * value;
    reinterpret_cast<float4*>(p.x + row * width)[quad] = x[i];
    reinterpret_cast<float4*>(p.x0 + row * width)[quad] = value;
  });
  if (p.rounded == nullptr) return;
  squares = 0;
  for_quads(p.n_embd, [&](int i, int quad) {
    reinterpret_cast<uint2*>(p.rounded + row * width)[quad] = pack4(x[i]);
    squares += squares_of(x[i]);
  });
  squares = row_sum(squares);
  if (threadIdx.x < RowSquares::kMost) p.squares.of(row)[threadIdx.x] = threadIdx.x == 0 ? squares : 0;
}

struct NormParams {
  int n_embd;
  float inverse_width, norm_eps;
  float* x;               // [rows, n_embd]
  const float* other;     // the same shape; null: x is normed as it is
  float own, share;       // else own * x + share * other is
  bool keeps;             // and becomes x
  float* middle;          // gets what x was; null: none
  const int* rows;        // which row of x each block takes; null: its own
  __nv_bfloat16* normed;  // [blocks, n_embd]
};

__global__ void __launch_bounds__(kRowThreads) norm_rows(const __grid_constant__ NormParams p) {
  allow_dependent();
  await_dependence();
  const int row = p.rows != nullptr ? p.rows[blockIdx.x] : static_cast<int>(blockIdx.x);
  const long long begin = static_cast<long long>(row) * p.n_embd;
  float4 x[kRowQuads] = {};
  float squares = 0;
  for_quads(p.n_embd, [&](int i, int quad) {
    x[i] = reinterpret_cast<const float4*>(p.x + begin)[quad];
    if (p.middle != nullptr) reinterpret_cast<float4*>(p.middle + begin)[quad] = x[i];
    if (p.other != nullptr) {
      x[i] = p.own * x[i] + p.share * reinterpret_cast<const float4*>(p.other + begin)[quad];
      if (p.keeps) reinterpret_cast<float4*>(p.x + begin)[quad] = x[i];
    }
    squares += squares_of(x[i]);
  });
  const float factor = rsqrtf(row_sum(squares) * p.inverse_width + p.norm_eps);
  auto* to = reinterpret_cast<uint2*>(p.normed + static_cast<long long>(blockIdx.x) * p.n_embd);
  for_quads(p.n_embd, [&](int i, int quad) { to[quad] = pack4(factor * x[i]); });
}

struct HeadParams {
  PassTokens tokens;
  int n_head, n_kv_head, n_embd;
  float norm_eps, qk_scale;
  const float *cos, *sin;            // [positions, 64]
  const __nv_bfloat16* normed;       // [rows, n_embd]
  const float* norm_factor;          // [rows]: what `normed` is to be multiplied by; null: 1
  const __nv_bfloat16* value_embed;  // [vocab, n_kv_head * 128]; null: none
  const float* ve_gate;              // [n_kv_head, gate_channels]
  int gate_channels;
  float gate_scale;
  __nv_bfloat16* qkv;               // [rows, (n_head + 2 n_kv_head) * 128]: raw; q becomes what attention takes
  __nv_bfloat16 *keys, *values;     // of the layer and the pass's first row of the cache: [., n_kv_head, capacity, 128]
  long long cache_row, cache_head;  // strides in elements
};

// The sum over a half warp.
__device__ inline float head_sum(float value) {
#pragma unroll
  for (int distance = kHeadLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffU << (threadIdx.x % 32 / kHeadLanes * kHeadLanes), value, distance);
  }
  return value;
}

// 1 / (1 + exp(-the product of the normed row with a KV head's gate)), in all lanes of a head.
__device__ inline float value_gate(const HeadParams& p, int row, int kv_head) {
  const __nv_bfloat16* normed = p.normed + static_cast<long long>(row) * p.n_embd;
  float gate = 0;
  for (int channel = static_cast<int>(threadIdx.x) % kHeadLanes; channel < p.gate_channels; channel += kHeadLanes) {
    gate += __bfloat162float(normed[channel]) * p.ve_gate[kv_head * p.gate_channels + channel];
  }
  return sigmoid(head_sum(gate));
}

// A half warp's head: lane l of 16 has dims 4 l to 4 l + 3 and those 64 behind. Grid: rows, groups of heads.
__global__ void __launch_bounds__(kHeadsAtOnce* kHeadLanes) prepare_heads(const __grid_constant__ HeadParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kHeadLanes, row = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y) * kHeadsAtOnce + static_cast<int>(threadIdx.x) / kHeadLanes;
  const int heads = p.n_head + 2 * p.n_kv_head;
  if (head >= heads) return;
  auto* raw = reinterpret_cast<uint2*>(p.qkv + (static_cast<long long>(row) * heads + head) * kHeadDim);
  const float4 a = unpack4(raw[lane]), b = unpack4(raw[kHeadLanes + lane]);
  const int position = p.tokens.position_of(row), kv_head = (head - p.n_head) % p.n_kv_head;
  const long long in_cache =
      row / p.tokens.length * p.cache_row + kv_head * p.cache_head + static_cast<long long>(position) * kHeadDim;
  if (head >= p.n_head + p.n_kv_head) {
    auto* to = reinterpret_cast<uint2*>(p.values + in_cache);
    float gate = 0;
    float4 embed_a{}, embed_b{};
    if (p.value_embed != nullptr) {
      const auto* embed = reinterpret_cast<const uint2*>(
          p.value_embed + (static_cast<long long>(p.tokens.token[row]) * p.n_kv_head + kv_head) * kHeadDim);
      embed_a = unpack4(embed[lane]);
      embed_b = unpack4(embed[kHeadLanes + lane]);
      gate = p.gate_scale * value_gate(p, row, kv_head);
    }
    to[lane] = pack4(a + gate * embed_a);
    to[kHeadLanes + lane] = pack4(b + gate * embed_b);
    return;
  }
  const long long table = static_cast<long long>(position) * kHeadLanes + lane;
  const float4 c = reinterpret_cast<const float4*>(p.cos)[table], s = reinterpret_cast<const float4*>(p.sin)[table];
  const float4 low = a * c + b * s, high = b * c + (-1.0F) * (a * s);
  const float squares = head_sum(squares_of(low) + squares_of(high));
  const float factor = p.qk_scale * rsqrtf(squares * (1.0F / kHeadDim) + p.norm_eps);
  uint2* to = head < p.n_head ? raw : reinterpret_cast<uint2*>(p.keys + in_cache);
  to[lane] = pack4(factor * low);
  to[kHeadLanes + lane] = pack4(factor * high);
}

// values = relu(values)^2, of `count` groups of eight
__global__ void square_relu(uint4* values, int count) {
  allow_dependent();
  await_dependence();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  const auto squared = [](std::uint32_t two) {
    const float2 v = unpack(two);
    const float a = fmaxf(v.x, 0.0F), b = fmaxf(v.y, 0.0F);
    return pack(a * a, b * b);
  };
  const uint4 v = values[i];
  values[i] = make_uint4(squared(v.x), squared(v.y), squared(v.z), squared(v.w));
}

// logits = softcap * tanh(logits / softcap), of `count` pairs
__global__ void cap_logits(float2* logits, int count, float softcap) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  const float2 v = logits[i];
  logits[i] = make_float2(softcap * tanhf(v.x / softcap), softcap * tanhf(v.y / softcap));
}

}  // namespace nanochat_x::cuda
