#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace nanochat_x::cuda {

inline constexpr int kHeadDim = 128;                                              // of every model that nanochat makes
inline constexpr float kScoreScale = 1.4426950408889634F * 0.08838834764831845F;  // log2(e) / sqrt(128)
inline constexpr int kMostSplits = 16;  // pieces of one head's keys, each attended to by one block
inline constexpr int kMostLayers = 48;
inline constexpr int kCopies = 8;      // of every word that all blocks read: one would be asked for too often
inline constexpr int kSplitKeys = 64;  // keys that a block attends to at once

/// One value of an exchange between blocks: the value's bits in the low half, the flag that says whose turn it is in
/// the high half. Both are written and read by one 64-bit access, so whoever sees the flag has the value.
using Word = unsigned long long;

/// Device pointers and constants of one layer. Matrices are row-major [N, K], bfloat16.
struct LayerParams {
  const __nv_bfloat16 *c_q, *c_k, *c_v, *c_proj, *c_fc, *mlp_c_proj;
  const __nv_bfloat16* value_embed;  // [vocab, n_kv_head * 128]; null: this layer has none
  const float* ve_gate;              // [n_kv_head, gate_channels]
  float resid_lambda, x0_lambda;     // 1 and 0 where the generation has none
  int window;                        // keys behind a query that it sees
};

/// What a sequence has reached; read when the kernel begins, written when it ends.
struct DecodeState {
  int token;     // to be fed next
  int previous;  // the token before it
  int position;  // of `token`
};

/// Words that blocks exchange within a step; each is reused in every layer, under another flag.
struct Exchange {
  Word* qkv;        // [(H + 2 H_kv) * 128], float32
  Word* partial;    // [H, kMostSplits, 64]: attention over a split of the keys, two bfloat16 a word
  Word* lse;        // [H, kMostSplits]: log2 of the split's sum of exponentials, float32
  Word* y;          // [2, C / 2]: what attention and MLP add to the residual stream, two bfloat16 a word
  Word* hidden;     // [mlp_width / 2]: inside the MLP, two bfloat16 a word
  Word* best;       // [blocks, 2]: each block's largest logit and its token
  int copy_stride;  // words from one copy to the next, of all but qkv
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
  const float *smear_gate, *cos, *sin;  // tables [positions, 64]
  __nv_bfloat16 *cache_k, *cache_v;     // [L, rows, H_kv, capacity, 128]; this launch uses one row
  long long cache_layer, cache_head;    // strides in elements
  Exchange exchange;
  unsigned first_flag;  // of this launch; a step uses n_layer + 1 of them
  DecodeState* state;
  const int* forced;  // [steps]: what to feed in the place of what was drawn; null: the most likely token
  int* drawn;         // [steps]: the most likely token after each step
  float* logits;      // [vocab], of the last step
  int steps;
  int slots;      // rows of the ring
  int in_flight;  // rows of the ring that are asked for at a time, at most
};

}  // namespace nanochat_x::cuda
