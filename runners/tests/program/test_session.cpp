#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "program.h"

using namespace nanochat_x::test;
using nlohmann::json;

namespace {

struct Reply {
  json line;
  std::vector<float> logits;  // empty where the answer has none
};

// The greeting and the answers of one run of `session`.
struct Dialogue {
  json greeting;
  std::vector<Reply> replies;
};

Dialogue talk(const FakeBundle& bundle, const std::vector<std::string>& requests) {
  std::string input;
  for (const auto& request : requests) input += request + "\n";
  const Run result = run_program({"session", bundle.path().string()}, input);
  REQUIRE_MESSAGE(result.exit_code == 0, result.err);
  CHECK(result.err.empty());
  Dialogue dialogue;
  std::size_t at = 0;
  const auto line = [&] {
    const std::size_t end = result.out.find('\n', at);
    REQUIRE(end != std::string::npos);
    const json value = json::parse(result.out.substr(at, end - at));
    at = end + 1;
    return value;
  };
  dialogue.greeting = line();
  while (at < result.out.size()) {
    Reply reply{.line = line(), .logits = {}};
    if (reply.line.contains("logits")) {
      std::size_t count = 1;
      for (const std::size_t size : reply.line["logits"]) count *= size;
      REQUIRE(at + count * sizeof(float) <= result.out.size());
      reply.logits.resize(count);
      std::memcpy(reply.logits.data(), result.out.data() + at, count * sizeof(float));
      at += count * sizeof(float);
    }
    dialogue.replies.push_back(std::move(reply));
  }
  return dialogue;
}

std::vector<float> expected(const std::vector<std::int64_t>& ids, std::int64_t rows) {
  const auto logits = FakeBackend({.vocab_size = 265}).forward(ids, rows, std::ssize(ids) / rows);
  return {logits.data.begin(), logits.data.end()};
}

std::string error_of(const Reply& reply) { return reply.line.value("error", ""); }

}  // namespace

TEST_CASE("session: logits of what was fed, and of a sequence without a cache") {
  const FakeBundle bundle(json::object(), 50);
  const auto dialogue =
      talk(bundle, {R"({"op": "new", "rows": 2})", R"({"op": "append", "ids": [[1, 2], [3, 4]]})",
                    R"({"op": "forward", "ids": [[1, 2], [3, 4]]})", R"({"op": "append", "ids": [[7], [8]]})"});
  CHECK(dialogue.greeting["vocab_size"] == 265);
  CHECK(dialogue.greeting["max_seq_len"] == 50);
  CHECK(dialogue.greeting["cached"] == true);
  REQUIRE(dialogue.replies.size() == 4);
  CHECK(dialogue.replies[0].line == json{{"positions", {0, 0}}});
  CHECK(dialogue.replies[1].line == json{{"positions", {2, 2}}, {"logits", {2, 2, 265}}});
  CHECK(dialogue.replies[1].logits == expected({1, 2, 3, 4}, 2));
  CHECK(dialogue.replies[2].line == json{{"logits", {2, 2, 265}}});
  CHECK(dialogue.replies[2].logits == expected({1, 2, 3, 4}, 2));
  const auto all = expected({1, 2, 7, 3, 4, 8}, 2);
  CHECK(std::equal(all.begin() + 2 * 265, all.begin() + 3 * 265, dialogue.replies[3].logits.begin()));
  CHECK(std::equal(all.begin() + 5 * 265, all.end(), dialogue.replies[3].logits.begin() + 265));
}

TEST_CASE("session: ragged rows, rollback, select, reset") {
  const auto dialogue =
      talk(FakeBundle(json::object(), 50),
           {R"({"op": "new", "rows": 2})", R"({"op": "append", "ids": [[1, 0], [3, 4]], "counts": [1, 2]})",
            R"({"op": "rollback", "row": 1, "position": 1})", R"({"op": "select", "source": [1, 0, 1]})",
            R"({"op": "append", "ids": [[5], [6], [7]]})", R"({"op": "reset"})"});
  REQUIRE(dialogue.replies.size() == 6);
  CHECK(dialogue.replies[1].line["positions"] == json{1, 2});
  CHECK(dialogue.replies[2].line == json{{"positions", {1, 1}}});
  CHECK(dialogue.replies[3].line == json{{"positions", {1, 1, 1}}});
  CHECK(dialogue.replies[4].line["positions"] == json{2, 2, 2});
  for (const auto& [row, ids] : {std::pair{0, std::vector<std::int64_t>{3, 5}}, {1, {1, 6}}, {2, {3, 7}}}) {
    const auto logits = expected(ids, 1);
    CHECK(std::equal(logits.begin() + 265, logits.end(), dialogue.replies[4].logits.begin() + row * 265));
  }
  CHECK(dialogue.replies[5].line == json{{"positions", {0, 0, 0}}});
}

TEST_CASE("session: a bad request is answered with an error, and the session goes on") {
  const auto dialogue =
      talk(FakeBundle(json::object(), 50),
           {R"({"op": "append", "ids": [[1]]})", R"({"op": "new", "rows": 2})", "", "[1", "{}", R"({"op": "jump"})",
            R"({"op": "append", "ids": [[1], [2, 3]]})", R"({"op": "append", "ids": []})",
            R"({"op": "append", "ids": [["a"], [1]]})", R"({"op": "append", "ids": [[265], [1]]})",
            R"({"op": "forward", "ids": [[265]]})", R"({"op": "rollback", "row": 5, "position": 0})",
            R"({"op": "append", "ids": [[1], [2]]})"});
  REQUIRE(dialogue.replies.size() == 13);
  CHECK(error_of(dialogue.replies[0]) == "there is no session yet; begin with {\"op\": \"new\", \"rows\": N}");
  for (const std::size_t malformed : {2, 3, 4, 8}) {
    CHECK(error_of(dialogue.replies[malformed]).starts_with("not a request as docs/session.md has them: "));
  }
  CHECK(error_of(dialogue.replies[5]).starts_with("there is no op 'jump'"));
  CHECK(error_of(dialogue.replies[6]).starts_with("ids are rows of several lengths"));
  CHECK(error_of(dialogue.replies[7]).starts_with("ids are empty"));
  for (const std::size_t unknown : {9, 10}) CHECK(holds(error_of(dialogue.replies[unknown]), "not in the vocabulary"));
  CHECK(holds(error_of(dialogue.replies[11]), "not one of the session's 2 rows"));
  CHECK(dialogue.replies[12].line == json{{"positions", {1, 1}}, {"logits", {2, 1, 265}}});
}
