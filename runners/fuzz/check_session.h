#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string_view>
#include <vector>

#include "../tests/fake_backend.h"
#include "demand.h"
#include "nanochat_x/session.h"

namespace nanochat_x::fuzz {

/// Numbers from a string of bytes; zeros behind its end.
class Bytes {
 public:
  explicit Bytes(std::string_view bytes) : bytes_(bytes) {}
  bool empty() const { return bytes_.empty(); }
  std::int64_t next() {
    if (empty()) return 0;
    const auto byte = static_cast<unsigned char>(bytes_.front());
    bytes_.remove_prefix(1);
    return byte;
  }
  /// Mostly a small number; sometimes, by the largest bytes, one that no session can mean.
  std::int64_t size(std::int64_t most) {
    const std::int64_t byte = next();
    if (byte == 255) return std::numeric_limits<std::int64_t>::max();
    if (byte == 254) return std::numeric_limits<std::int64_t>::min();
    if (byte == 253) return -1;
    return byte % (most + 1);
  }

 private:
  std::string_view bytes_;
};

/// A session, and beside it the simplest model of one: a list of ids a row. Each operation is done to both; the model
/// says whether it may be refused, what the rows hold after it, and a backend without a cache what the logits are.
class SessionCheck {
 public:
  static constexpr std::int64_t kVocab = 8;

  /// `backend` is the session's own and counts as `fake`, which may be wrapped by it.
  SessionCheck(Backend& backend, test::FakeBackend& fake, std::int64_t max_seq_len)
      : backend_(backend), fake_(fake), manifest_(test::fake_manifest(kVocab, max_seq_len)), most_(max_seq_len) {}

  void run(Bytes bytes) {
    begin(1);
    while (!bytes.empty()) {
      operate(bytes.next() % 12, bytes);
      compare();
    }
  }

 private:
  using Ids = std::vector<std::int64_t>;

  void operate(std::int64_t operation, Bytes& bytes) {
    switch (operation) {
      case 0:
        return begin(bytes.size(4));
      case 1:
      case 2:
      case 3:
        return append(bytes);
      case 4:
      case 5:
        return append_ragged(bytes);
      case 6:
        return prefill(bytes);
      case 7:
        return rollback(bytes.size(4), bytes.size(most_ + 1));
      case 8:
        return select(bytes);
      case 9:
        session_->reset();
        for (Ids& row : rows_) row.clear();
        failed_ = false;
        return;
      case 10:
        return reserve(bytes.size(most_ + 1));
      default:
        fake_.model().fail_at_step = static_cast<int>(fake_.steps + 1);
    }
  }

  void begin(std::int64_t rows) {
    const bool refused = refusal([&] { session_.emplace(backend_, manifest_, rows); }).has_value();
    demand(refused == (rows < 1 || rows > 65536), "a session has 1 to 65536 rows");
    if (refused) {
      if (!rows_.empty()) session_.emplace(backend_, manifest_, std::ssize(rows_));
    } else {
      rows_.resize(static_cast<std::size_t>(rows));
    }
    for (Ids& row : rows_) row.clear();
    failed_ = false;
  }

  Ids draw_ids(Bytes& bytes, std::int64_t length) {
    const std::int64_t each = std::clamp<std::int64_t>(length, 0, most_ + 2);
    std::int64_t count = each * std::ssize(rows_);
    const std::int64_t how = bytes.next();
    if (how == 255) ++count;  // not a whole number of rows
    Ids ids;
    for (std::int64_t i = 0; i < count; ++i) ids.push_back((how * 7 + i * i * 3 + i) % kVocab);
    if (how % 16 == 15 && !ids.empty()) {
      ids[static_cast<std::size_t>(bytes.next()) % ids.size()] = how % 32 == 15 ? kVocab : -1;
    }
    return ids;
  }

  bool fits(const Ids& ids, std::int64_t length, const Ids& counts) const {
    const std::int64_t rows = std::ssize(rows_);
    if (failed_ || length < 1 || length > most_ + 2 || std::ssize(ids) != rows * length) return false;
    for (std::int64_t b = 0; b < rows; ++b) {
      const std::int64_t count = counts[static_cast<std::size_t>(b)];
      if (std::ssize(rows_[static_cast<std::size_t>(b)]) + length > most_ || count < 1 || count > length) return false;
      for (std::int64_t t = 0; t < count; ++t) {
        const std::int64_t id = ids[static_cast<std::size_t>(b * length + t)];
        if (id < 0 || id >= kVocab) return false;
      }
    }
    return true;
  }

  /// Feeds by `call`, and compares what it gives with the model. `last_only`: logits of the last position alone.
  template <typename Call>
  void feed(const Ids& ids, std::int64_t length, const Ids& counts, bool may, bool last_only, Call&& call) {
    const auto steps = fake_.steps;
    std::optional<Logits> logits;
    bool runtime_failed = false;
    const bool refused = refusal([&] {
                           try {
                             logits = call();
                           } catch (const test::RuntimeFailed&) {
                             runtime_failed = true;
                           }
                         }).has_value();
    demand(refused == !may, "exactly what is not allowed is refused");
    demand(!refused || fake_.steps == steps, "what is refused computes nothing");
    failed_ = failed_ || runtime_failed;
    if (!logits) return;
    for (std::size_t b = 0; b < rows_.size(); ++b) {
      const auto fed = ids.begin() + static_cast<std::int64_t>(b) * length;
      rows_[b].insert(rows_[b].end(), fed, fed + counts[b]);
      check_row(*logits, static_cast<std::int64_t>(b), counts[b], last_only);
    }
  }

  void check_row(const Logits& logits, std::int64_t b, std::int64_t count, bool last_only) {
    const Ids& row = rows_[static_cast<std::size_t>(b)];
    const Logits expected = oracle_.forward(row, 1, std::ssize(row));
    for (std::int64_t t = last_only ? count - 1 : 0; t < count; ++t) {
      const auto got = logits.at(b, last_only ? 0 : t), want = expected.at(0, std::ssize(row) - count + t);
      demand(std::ranges::equal(got, want), "logits are those of the row's whole text");
    }
  }

  void append(Bytes& bytes) {
    const std::int64_t length = bytes.size(most_ > 8 ? bytes.next() % 16 == 0 ? most_ : 8 : most_ + 1);
    const Ids ids = draw_ids(bytes, length), counts(rows_.size(), length);
    feed(ids, length, counts, fits(ids, length, counts), false, [&] { return session_->append(ids, length); });
  }

  void append_ragged(Bytes& bytes) {
    const std::int64_t length = bytes.size(9);
    const Ids ids = draw_ids(bytes, length);
    Ids counts;
    for (std::size_t b = 0; b < rows_.size(); ++b) counts.push_back(bytes.size(9));
    const bool may = fits(ids, length, counts);
    feed(ids, length, counts, may, false, [&] { return session_->append_ragged(ids, length, counts); });
  }

  void prefill(Bytes& bytes) {
    const std::int64_t length = bytes.size(most_ + 1), chunk = bytes.size(12);
    const Ids ids = draw_ids(bytes, length), counts(rows_.size(), length);
    const bool may = chunk >= 1 && fits(ids, length, counts);
    feed(ids, length, counts, may, true, [&] { return session_->prefill(ids, length, chunk); });
  }

  void rollback(std::int64_t row, std::int64_t position) {
    const bool may = !failed_ && row >= 0 && row < std::ssize(rows_) && position >= 0 &&
                     position <= std::ssize(rows_[static_cast<std::size_t>(row)]);
    demand(refusal([&] { session_->rollback(row, position); }).has_value() == !may, "a row is only made shorter");
    if (may) rows_[static_cast<std::size_t>(row)].resize(static_cast<std::size_t>(position));
  }

  void select(Bytes& bytes) {
    Ids source;
    for (std::int64_t count = bytes.next() % 6; count > 0; --count) source.push_back(bytes.size(4));
    const bool may = !failed_ && !source.empty() &&
                     std::ranges::all_of(source, [&](std::int64_t row) { return row >= 0 && row < std::ssize(rows_); });
    demand(refusal([&] { session_->select_rows(source); }).has_value() == !may, "rows come from rows");
    if (!may) return;
    std::vector<Ids> chosen;
    for (const std::int64_t row : source) chosen.push_back(rows_[static_cast<std::size_t>(row)]);
    rows_ = std::move(chosen);
  }

  void reserve(std::int64_t capacity) {
    const bool may = !failed_ && capacity <= most_;
    demand(refusal([&] { session_->reserve(capacity); }).has_value() == !may, "room is what the context has");
  }

  void compare() {
    demand(session_->rows() == std::ssize(rows_), "the number of rows");
    for (const std::int64_t outside : {std::int64_t{-1}, std::ssize(rows_)}) {
      demand(refusal([&] { (void)session_->position(outside); }).has_value(), "a row that is not there is refused");
    }
    if (failed_) return;  // what it holds then is said by nobody
    for (std::size_t b = 0; b < rows_.size(); ++b) {
      const auto row = static_cast<std::int64_t>(b);
      demand(session_->position(row) == std::ssize(rows_[b]), "a row's length");
      demand(std::ranges::equal(session_->tokens(row), rows_[b]), "a row's tokens");
    }
    demand(fake_.largest_capacity <= most_, "a cache has no more room than the context");
  }

  Backend& backend_;
  test::FakeBackend& fake_;
  test::FakeBackend oracle_{{.vocab_size = kVocab}};
  Manifest manifest_;
  std::int64_t most_;
  std::optional<Session> session_;
  std::vector<Ids> rows_;
  bool failed_ = false;
};

/// The context's length, then operations on a session.
inline void check_session(std::string_view input) {
  constexpr std::array<std::int64_t, 8> kContexts = {24, 1, 3, 140, 24, 9, 5, 24};  // 140: past a cache's first size
  Bytes bytes(input);
  const std::int64_t most = kContexts.at(static_cast<std::size_t>(bytes.next() % 8));
  test::FakeBackend backend({.vocab_size = SessionCheck::kVocab});
  SessionCheck(backend, backend, most).run(bytes);
}

}  // namespace nanochat_x::fuzz
