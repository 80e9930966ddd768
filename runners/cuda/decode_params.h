#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "decoder.h"  // DecodeState

namespace nanochat_x::cuda {

inline constexpr int kHeadDim = 128;                                              // of every model that nanochat makes
inline constexpr float kScoreScale = 1.4426950408889634F * 0.08838834764831845F;  // log2(e) / sqrt(128)
inline constexpr int kMostLayers = 48;
inline constexpr int kRanks = 8;     // blocks of a cluster
inline constexpr int kMostRows = 4;  // sequences that one launch decodes: as many as have columns of the tensor cores
inline constexpr int kMostClusters = 16;  // half a warp has a lane for each
inline constexpr int kGroup = 32;         // columns of a vector that are packed together: a lane has one
inline constexpr int kHiddenUnit = 256;   // what is inside the MLP is dealt out to clusters by so many: a group a rank

/// One value of the exchange of the most likely tokens: the value's bits in the low half, the flag that says whose turn
/// it is in the high half. Both are written and read by one access, so whoever sees the flag has the value.
using Word = unsigned long long;

/// How the decode kernel takes the weights of a matrix.
enum class WeightFormat : std::uint8_t { kBfloat16, kInt8, kInt4 };

/// Device pointers and constants of one layer. Matrices are row-major [N, K], bfloat16.
struct LayerParams {
  const __nv_bfloat16 *c_q, *c_k, *c_v, *c_proj, *c_fc, *mlp_c_proj;
  const __nv_bfloat16* value_embed;  // [vocab, n_kv_head * 128]; null: this layer has none
  const float* ve_gate;              // [n_kv_head, gate_channels]
  float resid_lambda, x0_lambda;     // 1 and 0 where the generation has none
  int window;                        // keys behind a query that it sees
};

/// What a cluster computes of each layer: KV heads with their queries, and a part of the inside of the MLP.
struct ClusterShare {
  int kv_begin, kv_end, hidden_begin, hidden_end;

  __host__ __device__ int kv_heads() const { return kv_end - kv_begin; }
  __host__ __device__ int hidden() const { return hidden_end - hidden_begin; }
};

/// The rows of the residual stream that blocks of one rank add up: whole groups.
struct RankRows {
  int begin, end;

  __host__ __device__ RankRows(int n_embd, int rank)
      : begin(n_embd / kGroup * rank / kRanks * kGroup), end(n_embd / kGroup * (rank + 1) / kRanks * kGroup) {}
  __host__ __device__ int count() const { return end - begin; }
};

inline constexpr int kMostWidth = 2048;                               // of the residual stream
inline constexpr int kMostRankGroups = kMostWidth / kGroup / kRanks;  // of it

__host__ __device__ inline int most_rank_rows(int n_embd) { return (n_embd / kGroup + kRanks - 1) / kRanks * kGroup; }

/// What clusters exchange within a step. A word of 16 bytes carries four sums and a flag (exchange.cuh).
struct Exchange {
  uint4* attention;  // [kMostRows, kMostClusters, C / 4]: parts of what attention adds to the residual stream
  uint4* mlp;        // [2, kMostRows, kMostClusters, C / 4]: the same of the MLP, for even layers and odd ones
  Word* best;        // [kMostRows, blocks, 2]: each block's largest logit and its token
};

/// Where things lie in a block's dynamic shared memory, in bytes; decode_layout.h.
struct BlockLayout {
  int rotary, sums, x, mlp_x, qkv, parts, attended, hidden;  // of all rows
  int ring, ring_bytes;
};

/// How the copy engine reads the matrices of which a cluster takes some columns.
struct TensorMaps {
  CUtensorMap c_proj, mlp_c_proj;
};

/// Weights in 8 or 4 bits in the order in which blocks take them (packed_weights.h).
struct PackedStream {
  const unsigned char* layers;           // a block's are one run, over all layers
  long long cluster[kMostClusters];      // where the runs of a cluster's blocks begin
  long long layer_bytes[kMostClusters];  // of one block and layer
  const unsigned char* head;             // by 16 rows
};

/// Everything a launch needs. Sizes: C = n_embd, D = 128.
struct DecodeParams {
  int n_layer, n_embd, n_head, n_kv_head, mlp_width, vocab;
  float inverse_width;                // 1 / C
  float norm_eps, qk_scale, softcap;  // softcap 0: none
  float gate_scale;
  int gate_channels, smear_channels;  // 0: none
  float smear_lambda, backout_lambda;
  int backout_layer;  // -1: none
  const LayerParams* layers;
  const __nv_bfloat16 *wte, *lm_head;
  const float *smear_gate, *cos, *sin;           // tables [positions, 64]
  const TensorMaps* maps;                        // [n_layer], in bfloat16
  PackedStream packed;                           // in the place of matrices, in 8 and 4 bits
  __nv_bfloat16 *cache_k, *cache_v;              // [L, rows, H_kv, capacity, 128]; from this launch's first row on
  long long cache_layer, cache_row, cache_head;  // strides in elements
  Exchange exchange;
  unsigned first_flag;  // of this launch; a step uses n_layer + 1 of them
  DecodeState* state;   // [rows]
  const int* forced;    // [steps, rows]: what to feed in the place of what was drawn; null: the most likely tokens
  int* drawn;           // [steps, rows]: the most likely token after each step
  float* logits;        // [rows, vocab], of the last step
  int steps, rows;
  int clusters, attention_clusters;  // the first so many have KV heads
  ClusterShare shares[kMostClusters];
  BlockLayout layout;
  int in_flight;  // bytes that are asked for at a time, at most
};

}  // namespace nanochat_x::cuda
