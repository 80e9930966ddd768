#pragma once

#include <cstdint>
#include <vector>

#include "nanochat_x/bundle.h"

namespace nanochat_x::internal {

/// What one model makes a machine do, counted from its sizes; the limits of its speed follow. Bytes are those that a
/// step cannot do without: matrices whole, of embedding tables a row, of the cache what is live and inside the windows.
struct ModelWork {
  std::uint64_t weights_bytes = 0;    ///< of the files that hold the weights
  std::uint64_t matrix_bytes = 0;     ///< read by every step, in their stored width: scales, zeros and small ones too
  std::uint64_t row_bytes = 0;        ///< of the tables (embeddings, rotary), read for each token
  std::int64_t block_weights = 0;     ///< elements of the layers' matrices
  std::int64_t head_weights = 0;      ///< elements of lm_head
  std::int64_t kv_bytes = 0;          ///< of one token in one layer's cache, keys and values
  std::int64_t query_width = 0;       ///< n_head * head_dim
  std::vector<std::int64_t> windows;  ///< one a layer: keys before its own that a query sees; max_seq_len: all

  /// Bytes that a step of one new token in each of `rows` rows reads; the mean of `tokens` steps, of which the first
  /// finds `context` tokens in the cache.
  double decode_bytes(std::int64_t rows, std::int64_t context, std::int64_t tokens) const;
  /// The same of rows that continue one prompt of `prompt` tokens, whose keys and values are read once for all of them.
  double samples_bytes(std::int64_t rows, std::int64_t prompt, std::int64_t tokens) const;
  /// Floating point operations (a multiplication and an addition are two) of feeding `tokens` tokens to each of `rows`
  /// empty rows, with the logits of the last position alone.
  double prefill_operations(std::int64_t rows, std::int64_t tokens) const;
  /// Bytes of keys and values of `positions` tokens in each of `rows` rows.
  std::uint64_t cache_bytes(std::int64_t rows, std::int64_t positions) const;
};

/// Counted from the tensors of the weights' file; where a target keeps its weights inside the programs, from the sizes
/// and the dtype in the manifest. Throws Error if either cannot be read.
ModelWork work_of(const Bundle& bundle);

}  // namespace nanochat_x::internal
