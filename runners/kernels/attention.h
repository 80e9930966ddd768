#pragma once

#include <cstdint>
#include <span>

#include "kernels.h"

namespace nanochat_x::kernels {

/// Causal attention of T new tokens of B rows over their row's past and themselves, with H query heads and H_kv of keys
/// and values, each D wide; scores are divided by sqrt(D). The query at position p sees keys p - window .. p.
///
/// Everything is row-major and the caller's. It splits the parts [0, `parts`) between its threads, which may call at
/// once; each part of the result is written by one of them. Keys and values of live slots and new tokens must be
/// finite.
struct Attention {
  std::int64_t batch, steps, heads, kv_heads, width;  // B, T, H, H_kv, D, each 1 or more; H_kv divides H
  std::int64_t slots;                                 // S, of the past
  std::int64_t window;                                // negative: none
  Type type;                                          // of keys and values
  const float* q;                                     // [B, T, H, D]
  const void *k, *v;                                  // [B, H_kv, T, D]
  const void *past_k, *past_v;                        // [B, H_kv, S, D]; not read without positions
  const std::int64_t* position;                       // [B], 0 to S: live slots of each row; null: no past
  float* out;                                         // [B, T, H, D]

  /// How many parts the work has. Throws Error for sizes that are excluded above.
  std::int64_t parts() const;

  /// Computes parts [begin, end).
  void compute(std::int64_t begin, std::int64_t end) const;
};

/// Of one call.
inline constexpr std::int64_t kMostTokens = 64;

/// Consecutive tokens of one head: their queries, and where their results go.
struct Tokens {
  const float* q;
  std::int64_t q_stride, count, width;  // rows of q and out; count: up to kMostTokens
  float scale;
  std::int64_t position;  // of the first
  std::int64_t window;    // negative: none
  float* out;
  std::int64_t out_stride;
};

/// A run whose first key has the position `first`, and the others those behind it.
struct PlacedRun : Run {
  std::int64_t first;
};

/// `attend` for several tokens, each over the keys in its window and not behind it, of which there must be one at
/// least. Keys and values must be finite.
void attend_tokens(const Tokens& tokens, std::span<const PlacedRun> runs, Type type);

}  // namespace nanochat_x::kernels
