#include <doctest/doctest.h>

#include "engine_fixture.h"

using namespace nanochat_x::test;
using nanochat_x::GenerateOptions;
using nanochat_x::Generation;

TEST_CASE("the turns of a conversation reuse the cache and give what a fresh engine gives") {
  const std::vector<std::string> scripts = {"sure {2+2}___.", "no", "ok."};  // the second is cut by max_tokens
  EngineFixture f(scripts);
  nanochat_x::Conversation conversation(f.tokenizer);
  for (const char* text : {"hello", "and then?", "well", "bye"}) {
    conversation.add_user(text);
    const auto tokens = f.backend.tokens;
    const Generation kept = f.generate(conversation.ids(), greedy(20));
    EngineFixture fresh(scripts);
    CHECK(kept.samples[0].ids == one(fresh, conversation.ids(), greedy(20)).ids);
    // every token is fed once: those new since the last turn, and the reply's but its last
    const auto fed = std::ssize(conversation.ids()) - kept.timing.reused_tokens + std::ssize(kept.samples[0].ids) - 1;
    CHECK(f.backend.tokens - tokens == fed);
    conversation.add_reply(kept.samples[0].ids);
  }
  CHECK(f.generate(conversation.ids(), greedy(1)).timing.reused_tokens > 30);
}

TEST_CASE("any prompt after any other gives what a fresh engine gives") {
  EngineFixture f;
  const std::vector<Ids> prompts = {{1, 2, 3, 4, 5}, {1, 2, 3},         {1, 2, 3}, {1, 2, 9, 9, 9, 9}, {8},
                                    {8, 8},          {1, 2, 3, 4, 5, 6}};
  for (const Ids& prompt : prompts) {
    for (const bool sampled : {false, true}) {
      GenerateOptions options = sampled ? random_options(5, 1) : greedy(5);
      options.raw = true;
      const Generation generation = f.generate(prompt, options);
      CHECK(generation.samples[0].ids == plain_sample(f.backend, prompt, options, 0));
      CHECK(generation.timing.reused_tokens < std::ssize(prompt));
    }
  }
  f.generate({1, 2, 3, 4}, random_options(5, 3));  // several samples in between
  CHECK(one(f, {1, 2, 3, 4, 5}, random_options(5, 1)).ids ==
        plain_sample(f.backend, {1, 2, 3, 4, 5}, random_options(5, 1), 0));
}

TEST_CASE("a failed step does not leave a cache to go on with") {
  EngineFixture f;
  GenerateOptions options = greedy(5);
  options.raw = true;
  f.backend.model().fail_at_step = 3;
  CHECK_THROWS(f.generate(kQuestion, options));
  CHECK(one(f, kQuestion, options).ids == plain_sample(f.backend, kQuestion, options, 0));
  struct Stop {};
  CHECK_THROWS_AS(f.generate(kQuestion, options, [](auto, auto, auto) { throw Stop(); }), Stop);
  CHECK(one(f, kQuestion, options).ids == plain_sample(f.backend, kQuestion, options, 0));
}

TEST_CASE("a conversation has nanochat's tokens") {
  EngineFixture f;
  nanochat_x::Conversation conversation(f.tokenizer);
  CHECK(conversation.ids() == Ids{kBos});
  conversation.add_user("a<|bos|>");
  Ids expected = {kBos, 257};
  for (const char c : std::string_view("a<|bos|>")) expected.push_back(c);  // text, no special token
  expected.insert(expected.end(), {258, kAssistantStart});
  CHECK(conversation.ids() == expected);
  SUBCASE("a whole reply") {
    conversation.add_reply({'x', kAssistantEnd});
    expected.insert(expected.end(), {'x', kAssistantEnd});
  }
  SUBCASE("a reply that was cut") {
    conversation.add_reply({'x'});
    expected.insert(expected.end(), {'x', kAssistantEnd});
  }
  SUBCASE("no reply at all") {
    conversation.add_reply({});
    expected.push_back(kAssistantEnd);
  }
  SUBCASE("a reply that bos ended") {
    conversation.add_reply({'x', kBos});
    expected.insert(expected.end(), {'x', kBos, kAssistantEnd});
  }
  CHECK(conversation.ids() == expected);
  CHECK_FALSE(error_of([&] { conversation.add_user("\xff"); }).empty());
  CHECK(conversation.ids() == expected);
  conversation.clear();
  CHECK(conversation.ids() == Ids{kBos});
}
