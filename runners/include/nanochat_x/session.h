#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "nanochat_x/backend.h"

namespace nanochat_x {

/// A batch of sequences and their KV cache: the contract of the cached programs, checked.
///
/// Feeding a sequence in any split into `append`s equals feeding it at once. A call that throws before anything was
/// computed (bad ids, past capacity) changes nothing; after any other error only `reset` is allowed.
class Session {
 public:
  /// 1 to 65536 rows, `max_seq_len` positions at most; the cache grows to what is needed (`reserve` does it at once).
  Session(Backend& backend, const Manifest& manifest, std::int64_t rows);

  std::int64_t rows() const { return static_cast<std::int64_t>(tokens_.size()); }
  std::int64_t position(std::int64_t row) const;  ///< tokens in the row's cache
  std::int64_t max_seq_len() const { return max_seq_len_; }
  /// The ids in the row's cache; valid until the next call that changes the session.
  std::span<const std::int64_t> tokens(std::int64_t row) const;

  /// Feeds `length` tokens to every row, `ids` is `[rows, length]`. Returns logits `[rows, length, vocab]`.
  Logits append(std::span<const std::int64_t> ids, std::int64_t length);
  /// Feeds counts[b] <= length tokens of row b (1 <= counts[b]); the rest of the row is padding of any value, and the
  /// logits there mean nothing. Padding takes room too: `length` more positions must fit in every row. Logits are those
  /// of the columns `logits_to_keep` alone, ascending; if there are none, of all `length`.
  Logits append_ragged(std::span<const std::int64_t> ids, std::int64_t length, std::span<const std::int64_t> counts,
                       std::span<const std::int64_t> logits_to_keep = {});
  /// As `append`, with logits of the last position alone `[rows, 1, vocab]`: the others are not computed.
  Logits append_last(std::span<const std::int64_t> ids, std::int64_t length);
  /// Feeds a long sequence in pieces of at most `chunk` (none: of what suits the backend); returns logits of the last
  /// position alone `[rows, 1, vocab]`.
  Logits prefill(std::span<const std::int64_t> ids, std::int64_t length, std::optional<std::int64_t> chunk = {});
  std::int64_t prefill_chunk() const { return backend_->prefill_chunk(); }

  /// Makes the row `position` tokens long again (no longer than it is).
  void rollback(std::int64_t row, std::int64_t position);
  /// Every row empty.
  void reset();
  /// Room for `capacity` positions in every row (at most max_seq_len).
  void reserve(std::int64_t capacity);
  /// The session becomes source.size() rows; row r continues row source[r].
  void select_rows(std::span<const std::int64_t> source);

 private:
  std::int64_t longest() const;
  void check_usable() const;
  void check_shape(std::span<const std::int64_t> ids, std::int64_t length) const;
  void check_ids(std::span<const std::int64_t> ids, std::int64_t length, std::span<const std::int64_t> counts) const;
  void grow(std::int64_t needed);
  const std::vector<std::int64_t>& row_tokens(std::int64_t row) const;
  Logits run(std::span<const std::int64_t> ids, std::int64_t length, std::span<const std::int64_t> logits_to_keep);

  Backend* backend_;
  std::int64_t max_seq_len_, vocab_size_;
  std::unique_ptr<Cache> cache_;                   // none until something is fed
  std::vector<std::vector<std::int64_t>> tokens_;  // per row: what was fed, so that rollback knows the token before
  bool failed_ = false;                            // the backend threw: what the cache holds is unknown
};

}  // namespace nanochat_x
