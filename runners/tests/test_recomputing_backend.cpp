#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "fake_backend.h"
#include "nanochat_x/nanochat.h"
#include "nanochat_x/recomputing_backend.h"
#include "nanochat_x/session.h"

namespace nanochat_x::test {
namespace {

constexpr std::int64_t kVocab = 32;

// The same calls on a backend with a cache and on one that has none.
struct Twins {
  FakeBackend cached{FakeModel{}};
  RecomputingBackend recomputing{std::make_unique<FakeBackend>(FakeModel{}), fake_manifest(kVocab, 40)};
  Session expected, got;

  explicit Twins(std::int64_t rows)
      : expected(cached, fake_manifest(kVocab, 40), rows), got(recomputing, fake_manifest(kVocab, 40), rows) {}

  static bool same_data(const Logits& a, const Logits& b) {
    return a.length == b.length && a.batch == b.batch && std::ranges::equal(a.data, b.data);
  }

  // Feeds counts[b] tokens of row b to both; true if the logits of all that is no padding are the same.
  bool feed(const std::vector<std::int64_t>& counts, std::int64_t first_id = 3) {
    const std::int64_t length = std::ranges::max(counts);
    std::vector<std::int64_t> ids(counts.size() * static_cast<std::size_t>(length));
    std::iota(ids.begin(), ids.end(), first_id);
    for (auto& id : ids) id %= kVocab;
    const std::int64_t last = length - 1;
    if (expected.rows() > 1 && !same_data(expected.append_ragged(ids, length, counts, {&last, 1}),
                                          got.append_ragged(ids, length, counts, {&last, 1}))) {
      return false;
    }
    const Logits a = expected.append_ragged(ids, length, counts), b = got.append_ragged(ids, length, counts);
    bool same = a.data.size() == b.data.size() && a.length == b.length && a.batch == b.batch;
    for (std::size_t row = 0; same && row < counts.size(); ++row) {
      for (std::int64_t t = 0; same && t < counts[row]; ++t) {
        same = std::ranges::equal(a.at(static_cast<std::int64_t>(row), t), b.at(static_cast<std::int64_t>(row), t));
      }
    }
    return same;
  }
};

TEST_CASE("computing anew gives the logits of a cache: chunks, ragged rows, rollback, forks") {
  Twins one(1);
  CHECK(one.feed({1}));
  CHECK(one.feed({7}));
  one.expected.rollback(0, 3);
  one.got.rollback(0, 3);
  CHECK(one.feed({2}, 11));
  const std::vector<std::int64_t> thrice(3, 0);
  one.expected.select_rows(thrice);
  one.got.select_rows(thrice);
  CHECK(one.feed({1, 4, 2}, 5));
  CHECK(one.feed({3, 1, 1}, 9));
  one.expected.rollback(1, 0);
  one.got.rollback(1, 0);
  CHECK(one.feed({1, 2, 1}, 1));
}

TEST_CASE("the comparison above sees a token that differs") {
  Twins twins(2);
  CHECK(twins.feed({2, 2}));
  const std::vector<std::int64_t> other = {4, 5};
  (void)twins.got.append(other, 1);
  const std::vector<std::int64_t> another = {4, 6};
  (void)twins.expected.append(another, 1);
  CHECK_FALSE(twins.feed({1, 1}));
}

}  // namespace
}  // namespace nanochat_x::test
