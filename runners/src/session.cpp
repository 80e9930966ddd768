#include "nanochat_x/session.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <utility>

#include "checks.h"
#include "nanochat_x/error.h"

namespace nanochat_x {
namespace {

constexpr std::int64_t kMostRows = 65536;  // a slip of the finger must not fill the memory
constexpr std::int64_t kCacheStep = 128;   // capacities are multiples of it, or max_seq_len

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

void check_rows(std::int64_t rows) {
  if (rows < 1) throw Error("a session needs at least one row; got " + std::to_string(rows));
  if (rows > kMostRows) {
    throw Error("a session has at most " + std::to_string(kMostRows) + " rows; got " + std::to_string(rows));
  }
}

// Columns of a step of `length` tokens, each one once and in order.
void check_kept(std::span<const std::int64_t> columns, std::int64_t length) {
  std::int64_t least = 0;
  for (const std::int64_t column : columns) {
    if (column < least || column >= length) {
      throw Error("logits_to_keep must be ascending columns from 0 to " + std::to_string(length - 1) + "; got " +
                  std::to_string(column));
    }
    least = column + 1;
  }
}

}  // namespace

Session::Session(Backend& backend, const Manifest& manifest, std::int64_t rows)
    : backend_(&backend), max_seq_len_(manifest.max_seq_len), vocab_size_(manifest.vocab_size) {
  check_rows(rows);
  tokens_.resize(index(rows));
}

const std::vector<std::int64_t>& Session::row_tokens(std::int64_t row) const {
  if (row < 0 || row >= rows()) {
    throw Error("row " + std::to_string(row) + " is not one of the session's " + std::to_string(rows()) + " rows");
  }
  return tokens_[index(row)];
}

std::int64_t Session::position(std::int64_t row) const { return std::ssize(row_tokens(row)); }

std::span<const std::int64_t> Session::tokens(std::int64_t row) const { return row_tokens(row); }

std::int64_t Session::longest() const {
  std::int64_t length = 0;
  for (const auto& row : tokens_) length = std::max(length, std::ssize(row));
  return length;
}

void Session::check_usable() const {
  if (failed_) throw Error("an earlier step of this session failed: reset it first");
}

void Session::check_shape(std::span<const std::int64_t> ids, std::int64_t length) const {
  if (length < 1) throw Error("a step needs at least one token a row; got " + std::to_string(length));
  if (std::ssize(ids) % rows() != 0 || std::ssize(ids) / rows() != length) {
    throw Error(std::to_string(rows()) + " rows of " + std::to_string(length) + " tokens cannot be filled with " +
                std::to_string(ids.size()) + " ids");
  }
  check_fits("sequence", longest() + length, max_seq_len_);
}

void Session::check_ids(std::span<const std::int64_t> ids, std::int64_t length,
                        std::span<const std::int64_t> counts) const {
  for (std::int64_t b = 0; b < rows(); ++b) {
    for (std::int64_t i = b * length; i < b * length + counts[index(b)]; ++i) {
      check_id(ids[index(i)], vocab_size_, [&] { return place(i, length); });
    }
  }
}

void Session::grow(std::int64_t needed) {
  const std::int64_t capacity = cache_ ? cache_->capacity() : 0;
  if (needed <= capacity) return;
  std::int64_t wanted = std::max(needed, capacity + capacity / 2);  // by half: copying stays linear in the length
  wanted = std::min(max_seq_len_, (wanted + kCacheStep - 1) / kCacheStep * kCacheStep);
  if (!cache_) {
    cache_ = backend_->new_cache(rows(), wanted);
    return;
  }
  std::vector<std::int64_t> same(tokens_.size());
  std::iota(same.begin(), same.end(), std::int64_t{0});
  cache_ = cache_->copy(same, longest(), wanted);
}

Logits Session::run(std::span<const std::int64_t> ids, std::int64_t length,
                    std::span<const std::int64_t> logits_to_keep) {
  std::vector<std::int64_t> previous, position;
  for (const auto& row : tokens_) {
    previous.push_back(row.empty() ? 0 : row.back());
    position.push_back(std::ssize(row));
  }
  const Step step{.input_ids = ids,
                  .prev_ids = previous,
                  .position = position,
                  .logits_to_keep = logits_to_keep,
                  .batch = rows(),
                  .length = length};
  failed_ = true;  // until the step is through
  Logits logits = backend_->step(step, *cache_);
  failed_ = false;
  return logits;
}

Logits Session::append(std::span<const std::int64_t> ids, std::int64_t length) {
  const std::vector<std::int64_t> counts(tokens_.size(), length);
  return append_ragged(ids, length, counts);
}

Logits Session::append_last(std::span<const std::int64_t> ids, std::int64_t length) {
  const std::vector<std::int64_t> counts(tokens_.size(), length);
  const std::int64_t last = length - 1;
  return append_ragged(ids, length, counts, {&last, 1});
}

Logits Session::append_ragged(std::span<const std::int64_t> ids, std::int64_t length,
                              std::span<const std::int64_t> counts, std::span<const std::int64_t> logits_to_keep) {
  check_usable();
  check_shape(ids, length);
  if (std::ssize(counts) != rows()) {
    throw Error(std::to_string(rows()) + " rows need as many counts; got " + std::to_string(counts.size()));
  }
  for (const std::int64_t count : counts) {
    if (count < 1 || count > length) {
      throw Error("a row's count must be 1 to " + std::to_string(length) + "; got " + std::to_string(count));
    }
  }
  check_ids(ids, length, counts);
  check_kept(logits_to_keep, length);
  std::vector<std::int64_t> padded(ids.size(), 0);  // padding has to be valid ids
  for (std::int64_t b = 0; b < rows(); ++b) {
    std::ranges::copy(ids.subspan(index(b * length), index(counts[index(b)])), padded.begin() + b * length);
  }
  grow(longest() + length);
  std::vector<std::int64_t> kept(logits_to_keep.begin(), logits_to_keep.end());
  if (kept.empty()) {
    kept.resize(index(length));
    std::iota(kept.begin(), kept.end(), std::int64_t{0});
  }
  Logits logits = run(padded, length, kept);
  for (std::int64_t b = 0; b < rows(); ++b) {
    const auto row = ids.subspan(index(b * length), index(counts[index(b)]));
    tokens_[index(b)].insert(tokens_[index(b)].end(), row.begin(), row.end());
  }
  return logits;
}

Logits Session::prefill(std::span<const std::int64_t> ids, std::int64_t length, std::optional<std::int64_t> size) {
  check_usable();
  const std::int64_t chunk = size.value_or(prefill_chunk());
  if (chunk < 1) throw Error("prefill needs a chunk of at least one token; got " + std::to_string(chunk));
  check_shape(ids, length);
  check_ids(ids, length, std::vector<std::int64_t>(tokens_.size(), length));  // all, before the first piece is fed
  grow(longest() + length);
  Logits logits;
  std::vector<std::int64_t> piece;
  for (std::int64_t begin = 0; begin < length; begin += chunk) {
    const std::int64_t count = std::min(chunk, length - begin);
    piece.clear();
    for (std::int64_t b = 0; b < rows(); ++b) {
      const auto part = ids.subspan(index(b * length + begin), index(count));
      piece.insert(piece.end(), part.begin(), part.end());
    }
    logits = append_last(piece, count);
  }
  return logits;
}

void Session::rollback(std::int64_t row, std::int64_t position) {
  check_usable();
  if (position < 0 || position > std::ssize(row_tokens(row))) {
    throw Error("row " + std::to_string(row) + " holds " + std::to_string(row_tokens(row).size()) +
                " tokens: it cannot be rolled back to " + std::to_string(position));
  }
  tokens_[index(row)].resize(index(position));
}

void Session::reset() {
  for (auto& row : tokens_) row.clear();
  failed_ = false;
}

void Session::reserve(std::int64_t capacity) {
  check_usable();
  check_fits("sequence", capacity, max_seq_len_);
  grow(capacity);
}

void Session::select_rows(std::span<const std::int64_t> source) {
  check_usable();
  check_rows(std::ssize(source));
  std::vector<std::vector<std::int64_t>> chosen;
  for (const std::int64_t row : source) chosen.push_back(row_tokens(row));
  std::int64_t length = 0;
  for (const auto& row : chosen) length = std::max(length, std::ssize(row));
  if (cache_) cache_ = cache_->copy(source, length, cache_->capacity());
  tokens_ = std::move(chosen);
}

}  // namespace nanochat_x
