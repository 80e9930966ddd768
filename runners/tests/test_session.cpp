#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "error_of.h"
#include "fake_backend.h"
#include "nanochat_x/sampler.h"
#include "nanochat_x/session.h"

using nanochat_x::Logits;
using nanochat_x::Manifest;
using nanochat_x::Session;
using nanochat_x::test::contains;
using nanochat_x::test::error_of;
using nanochat_x::test::fake_manifest;
using nanochat_x::test::FakeBackend;

namespace {

using Ids = std::vector<std::int64_t>;

constexpr std::int64_t kVocab = 32;

Ids random_ids(std::size_t n, std::uint64_t seed) {
  nanochat_x::Random random(seed, 0);
  Ids ids(n);
  for (auto& id : ids) id = static_cast<std::int64_t>(random.next_u32() % kVocab);
  return ids;
}

std::vector<float> values(std::span<const float> logits) { return {logits.begin(), logits.end()}; }

// What the model says after the last of `ids`, computed without a cache.
std::vector<float> truth(FakeBackend& backend, const Ids& ids) {
  return values(backend.forward(ids, 1, std::ssize(ids)).at(0, std::ssize(ids) - 1));
}

struct Fixture {
  FakeBackend backend{{.vocab_size = kVocab}};
  Manifest manifest = fake_manifest(kVocab, 300);
};

}  // namespace

TEST_CASE("the toy model tells a wrong token, place, or token before") {
  Fixture f;
  const auto run = [&](Ids ids, Ids previous, Ids position) {
    auto cache = f.backend.new_cache(1, 10);
    const Ids first = {1, 2, 3};
    const Ids zero = {0};
    f.backend.step(
        {.input_ids = first, .prev_ids = zero, .position = zero, .logits_to_keep = zero, .batch = 1, .length = 3},
        *cache);
    return values(f.backend
                      .step({.input_ids = ids,
                             .prev_ids = previous,
                             .position = position,
                             .logits_to_keep = zero,
                             .batch = 1,
                             .length = 1},
                            *cache)
                      .data);
  };
  const auto right = truth(f.backend, {1, 2, 3, 4});
  CHECK(run({4}, {3}, {3}) == right);
  CHECK(run({5}, {3}, {3}) != right);
  CHECK(run({4}, {2}, {3}) != right);
  CHECK(run({4}, {3}, {2}) != right);
  CHECK_THROWS_AS(run({4}, {3}, {10}), std::logic_error);
  CHECK_THROWS_AS(run({kVocab}, {3}, {3}), std::logic_error);
}

TEST_CASE("every split of a sequence gives the logits of feeding it at once") {
  Fixture f;
  const Ids ids = random_ids(7, 1);
  const Logits whole = f.backend.forward(ids, 1, 7);
  for (unsigned cuts = 0; cuts < 64; ++cuts) {  // bit i: a cut after token i
    Session session(f.backend, f.manifest, 1);
    std::vector<float> got;
    for (std::size_t begin = 0, i = 0; i < ids.size(); ++i) {
      if (i + 1 < ids.size() && (cuts >> i & 1U) == 0) continue;
      const auto part =
          session.append(std::span(ids).subspan(begin, i + 1 - begin), static_cast<std::int64_t>(i + 1 - begin));
      got.insert(got.end(), part.data.begin(), part.data.end());
      begin = i + 1;
    }
    CHECK(got == values(whole.data));
    CHECK(session.position(0) == 7);
  }
}

TEST_CASE("a batch is its rows, each on its own") {
  Fixture f;
  const Ids ids = random_ids(12, 2);
  Session session(f.backend, f.manifest, 3);
  const Logits logits = session.append(ids, 4);
  CHECK(logits.batch == 3);
  CHECK(logits.length == 4);
  for (std::int64_t b = 0; b < 3; ++b) {
    CHECK(values(logits.at(b, 3)) == truth(f.backend, Ids(ids.begin() + 4 * b, ids.begin() + 4 * b + 4)));
  }
}

TEST_CASE("rows of different lengths") {
  Fixture f;
  Session session(f.backend, f.manifest, 3);
  std::vector<Ids> fed(3);
  const std::vector<Ids> counts = {{1, 3, 5}, {4, 1, 2}, {1, 1, 1}, {2, 5, 3}};
  for (const Ids& count : counts) {
    Ids padded(15, -1);  // the padding is no valid id
    for (std::size_t b = 0; b < 3; ++b) {
      const Ids more = random_ids(static_cast<std::size_t>(count[b]), 10 * b + fed[b].size());
      std::copy(more.begin(), more.end(), padded.begin() + static_cast<std::ptrdiff_t>(5 * b));
      fed[b].insert(fed[b].end(), more.begin(), more.end());
    }
    const Logits logits = session.append_ragged(padded, 5, count);
    for (std::size_t b = 0; b < 3; ++b) {
      const auto row = static_cast<std::int64_t>(b);
      CHECK(values(logits.at(row, count[b] - 1)) == truth(f.backend, fed[b]));
      CHECK(session.position(row) == std::ssize(fed[b]));
      CHECK(Ids(session.tokens(row).begin(), session.tokens(row).end()) == fed[b]);
    }
  }
}

TEST_CASE("rolling back and going on another way") {
  Fixture f;
  for (const std::int64_t kept : {0, 1, 4, 6}) {
    Session session(f.backend, f.manifest, 1);
    Ids ids = random_ids(6, 3);
    session.append(ids, 6);
    session.rollback(0, kept);
    CHECK(session.position(0) == kept);
    ids.resize(static_cast<std::size_t>(kept));
    const Ids more = random_ids(3, 4);
    ids.insert(ids.end(), more.begin(), more.end());
    const Logits logits = session.append(more, 3);
    CHECK(values(logits.at(0, 2)) == truth(f.backend, ids));
  }
  Session session(f.backend, f.manifest, 2);  // one row alone
  const Ids ids = {1, 2, 3, 4, 5, 6};
  session.append(ids, 3);
  session.rollback(1, 1);
  const Logits logits = session.append(Ids{7, 8}, 1);
  CHECK(values(logits.at(0, 0)) == truth(f.backend, {1, 2, 3, 7}));
  CHECK(values(logits.at(1, 0)) == truth(f.backend, {4, 8}));
}

TEST_CASE("rows are forked, dropped and put in another order") {
  Fixture f;
  Session session(f.backend, f.manifest, 1);
  session.append(Ids{1, 2, 3}, 3);
  session.select_rows(Ids{0, 0, 0});
  CHECK(session.rows() == 3);
  session.append(Ids{4, 5, 6}, 1);
  session.rollback(0, 2);
  session.select_rows(Ids{2, 0});
  const Logits logits = session.append(Ids{7, 8}, 1);
  CHECK(values(logits.at(0, 0)) == truth(f.backend, {1, 2, 3, 6, 7}));
  CHECK(values(logits.at(1, 0)) == truth(f.backend, {1, 2, 8}));
  Session empty(f.backend, f.manifest, 1);  // before anything is fed
  empty.select_rows(Ids{0, 0});
  CHECK(values(empty.append(Ids{1, 2}, 1).at(1, 0)) == truth(f.backend, {2}));
}

TEST_CASE("the cache grows to the context's end and not past it") {
  Fixture f;
  Session session(f.backend, f.manifest, 1);
  Ids ids = random_ids(300, 5);
  for (std::size_t i = 0; i < 300; ++i) {
    const Logits logits = session.append(std::span(ids).subspan(i, 1), 1);
    if (i % 37 == 0 || i == 299) {
      CHECK(values(logits.at(0, 0)) ==
            truth(f.backend, Ids(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(i) + 1)));
    }
  }
  CHECK(f.backend.largest_capacity == 300);
  const auto steps = f.backend.steps;
  CHECK(contains(error_of([&] { session.append(Ids{1}, 1); }), "301 tokens is longer than the model's context of 300"));
  CHECK(f.backend.steps == steps);
  session.rollback(0, 299);
  ids[299] = 9;
  CHECK(values(session.append(Ids{9}, 1).at(0, 0)) == truth(f.backend, ids));
}

TEST_CASE("prefill in pieces gives the last position's logits") {
  Fixture f;
  for (const std::int64_t chunk : {1, 64, 100, 256}) {
    f.backend.lengths.clear();
    Session session(f.backend, f.manifest, 2);
    const Ids ids = random_ids(260, 6);
    const Logits logits = session.prefill(ids, 130, chunk);
    CHECK(logits.batch == 2);
    CHECK(logits.length == 1);
    CHECK(values(logits.at(0, 0)) == truth(f.backend, Ids(ids.begin(), ids.begin() + 130)));
    CHECK(values(logits.at(1, 0)) == truth(f.backend, Ids(ids.begin() + 130, ids.end())));
    CHECK(std::ssize(f.backend.lengths) == (130 + chunk - 1) / chunk);
  }
}

TEST_CASE("logits of chosen columns alone") {
  Fixture f;
  const Ids ids = random_ids(10, 7);
  for (const Ids& kept : std::vector<Ids>{{0}, {4}, {1, 3}, {0, 1, 2, 3, 4}}) {
    Session session(f.backend, f.manifest, 2);
    const Logits logits = session.append_ragged(ids, 5, Ids{5, 5}, kept);
    CHECK(logits.length == std::ssize(kept));
    for (std::int64_t b = 0; b < 2; ++b) {
      for (std::size_t i = 0; i < kept.size(); ++i) {
        const auto begin = ids.begin() + 5 * b;
        CHECK(values(logits.at(b, static_cast<std::int64_t>(i))) == truth(f.backend, Ids(begin, begin + kept[i] + 1)));
      }
    }
    CHECK(session.position(1) == 5);
  }
  Session session(f.backend, f.manifest, 1);
  CHECK(values(session.append_last(Ids{1, 2, 3}, 3).data) == truth(f.backend, {1, 2, 3}));
}

TEST_CASE("reserve, reset") {
  Fixture f;
  Session session(f.backend, f.manifest, 1);
  session.reserve(300);
  CHECK(contains(error_of([&] { session.reserve(301); }), "context of 300"));
  session.append(Ids{1, 2}, 2);
  session.reset();
  CHECK(session.position(0) == 0);
  CHECK(values(session.append(Ids{3}, 1).at(0, 0)) == truth(f.backend, {3}));
}

TEST_CASE("a call that cannot be meant changes nothing") {
  Fixture f;
  Session session(f.backend, f.manifest, 2);
  session.append(Ids{1, 2}, 1);
  const auto refused = [&](auto call, const std::string& part) {
    const auto steps = f.backend.steps;
    CHECK_MESSAGE(contains(error_of([&] { call(); }), part), part);
    CHECK(f.backend.steps == steps);
    CHECK(session.position(0) == 1);
    CHECK(session.rows() == 2);
  };
  refused([&] { session.append(Ids{1, 2, 3, kVocab}, 2); }, "token id 32 at [1, 1]");
  refused([&] { session.append(Ids{-1, 0}, 1); }, "token id -1 at [0, 0]");
  refused([&] { session.append(Ids{}, 0); }, "at least one token");
  refused([&] { session.append(Ids{1, 2, 3}, 1); }, "3 ids");
  refused([&] { session.append(Ids(600, 1), 300); }, "301 tokens");
  refused([&] { session.append_ragged(Ids{1, 2, 3, 4}, 2, Ids{0, 1}); }, "count");
  refused([&] { session.append_ragged(Ids{1, 2, 3, 4}, 2, Ids{3, 1}); }, "count");
  refused([&] { session.append_ragged(Ids{1, 2, 3, 4}, 2, Ids{1}); }, "counts");
  for (const Ids& kept : std::vector<Ids>{{2}, {-1}, {1, 0}, {1, 1}}) {
    refused([&] { session.append_ragged(Ids{1, 2, 3, 4}, 2, Ids{2, 2}, kept); }, "ascending columns from 0 to 1");
  }
  refused([&] { session.prefill(Ids{1, 2, 3, 77}, 2, 1); }, "token id 77 at [1, 1]");
  refused([&] { session.prefill(Ids{1, 2}, 1, 0); }, "chunk");
  refused([&] { session.rollback(0, 2); }, "rolled back");
  refused([&] { session.rollback(0, -1); }, "rolled back");
  refused([&] { session.rollback(2, 0); }, "row 2");
  refused([&] { (void)session.position(-1); }, "row -1");
  refused([&] { session.select_rows(Ids{0, 2}); }, "row 2");
  refused([&] { session.select_rows(Ids{}); }, "at least one row");
  refused([&] { Session(f.backend, f.manifest, 0); }, "at least one row");
  refused([&] { Session(f.backend, f.manifest, 65537); }, "at most 65536 rows");
  refused([&] { Session(f.backend, f.manifest, std::int64_t{1} << 62); }, "at most 65536 rows");
  CHECK(values(session.append(Ids{3, 4}, 1).at(1, 0)) == truth(f.backend, {2, 4}));
}

TEST_CASE("after the backend failed, only reset goes on") {
  Fixture f;
  f.backend.model().fail_at_step = 2;
  Session session(f.backend, f.manifest, 1);
  session.append(Ids{1}, 1);
  CHECK_THROWS_AS(session.append(Ids{2}, 1), std::runtime_error);
  CHECK(contains(error_of([&] { session.append(Ids{2}, 1); }), "reset"));
  CHECK(contains(error_of([&] { session.rollback(0, 0); }), "reset"));
  CHECK(contains(error_of([&] { session.select_rows(Ids{0}); }), "reset"));
  session.reset();
  CHECK(values(session.append(Ids{2}, 1).at(0, 0)) == truth(f.backend, {2}));
}
