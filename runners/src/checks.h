#pragma once

#include <cstdint>
#include <string>

#include "nanochat_x/error.h"

namespace nanochat_x {

/// Throws Error if `id` is not in a vocabulary of `vocab_size`; `where()` says which token it is.
template <typename Where>
void check_id(std::int64_t id, std::int64_t vocab_size, const Where& where) {
  if (id >= 0 && id < vocab_size) return;
  throw Error("token id " + std::to_string(id) + " at " + where() + " is not in the vocabulary (ids 0 to " +
              std::to_string(vocab_size - 1) + ")");
}

/// Throws Error if `what` ("prompt", "sequence") of `tokens` tokens does not fit in `max_seq_len` positions.
inline void check_fits(const char* what, std::int64_t tokens, std::int64_t max_seq_len) {
  if (tokens <= max_seq_len) return;
  throw Error(what + (" of " + std::to_string(tokens)) + " tokens is longer than the model's context of " +
              std::to_string(max_seq_len) + "; shorten it, or lower again with a larger --max-seq-len");
}

/// "[row, column]" of element i of a `[rows, length]` array.
inline std::string place(std::int64_t i, std::int64_t length) {
  return "[" + std::to_string(i / length) + ", " + std::to_string(i % length) + "]";
}

}  // namespace nanochat_x
