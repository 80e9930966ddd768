#include <doctest/doctest.h>

#include "engine_fixture.h"

using namespace nanochat_x::test;
using nanochat_x::GenerateOptions;
using nanochat_x::Sample;
using nanochat_x::StopReason;

TEST_CASE("the calculator's result is forced, between its tokens, with mask 0") {
  EngineFixture f({"so {1+2}___!."});
  const Sample sample = one(f, kQuestion, greedy());
  CHECK(sample.ids == ids_of("so {1+2}[3]!."));
  CHECK(sample.mask == mask_of("11111111"
                               "000"
                               "11"));
  CHECK(sample.stop == StopReason::stop_token);
}

TEST_CASE("nanochat's state machine around an expression") {
  struct Case {
    const char* wanted;  // what the model would say, '_' where it is not asked
    const char* got;
    const char* mask;
  };
  for (const Case& c : {
           Case{"{1/}ab.", "{1/}ab.", "1111111"},  // no result: nothing forced
           Case{"{}ab.", "{}ab.", "11111"},        // no expression
           Case{"1+1}ab.", "1+1}ab.", "1111111"},  // an end without a start
           Case{"{9{1+1}___.", "{9{1+1}[2].",
                "1111111"
                "000"
                "1"},  // a second start begins anew
           Case{"{1+1}___}.", "{1+1}[2]}.",
                "11111"
                "000"
                "11"},                                         // a second end does nothing
           Case{"{1/}2+2}ab.", "{1/}2+2}ab.", "11111111111"},  // what follows an end is no expression
           Case{"{1+1}___{2*3}___.", "{1+1}[2]{2*3}[6].",
                "11111"
                "000"
                "11111"
                "000"
                "1"},
           Case{"{1,000*2}______.", "{1,000*2}[2000].",
                "111111111"
                "000000"
                "1"},
           Case{"{'aba'count('a')}.", "{'aba'count('a')}.", "111111111111111111"},  // no ".count(": not evaluated
       }) {
    EngineFixture f({c.wanted});
    const Sample sample = one(f, kQuestion, greedy());
    CHECK_MESSAGE(sample.ids == ids_of(c.got), std::string(c.got));
    CHECK_MESSAGE(sample.mask == mask_of(c.mask), std::string(c.got));
    CHECK(sample.stop == StopReason::stop_token);
  }
}

TEST_CASE("a special token inside an expression is a part of it, as in nanochat") {
  EngineFixture f({"{1+[1}x."});  // "1+<|output_start|>1" is no expression of the calculator
  const Sample sample = one(f, kQuestion, greedy());
  CHECK(sample.ids == ids_of("{1+[1}x."));
}

TEST_CASE("a forced token goes through the model") {
  EngineFixture f({"{1+2}___"});
  GenerateOptions options = greedy(12);
  const Sample sample = one(f, kQuestion, options);
  // the tokens after the script are the toy model's own, and depend on every token before, forced ones included
  Ids so_far = kQuestion;
  so_far.insert(so_far.end(), sample.ids.begin(), sample.ids.begin() + 8);
  GenerateOptions rest = greedy(4);
  rest.raw = true;
  CHECK(Ids(sample.ids.begin() + 8, sample.ids.end()) == plain_sample(f.backend, so_far, rest, 0));
}

TEST_CASE("forced tokens are cut by max_tokens and by the context like others") {
  EngineFixture f({"{1+2}___a."});
  const Sample cut = one(f, kQuestion, greedy(6));
  CHECK(cut.ids == ids_of("{1+2}["));
  CHECK(cut.stop == StopReason::max_tokens);
  EngineFixture small({"{1+2}___a."}, 11);  // 6 of the prompt, 5 fed, one more that is not
  const Sample full = one(small, kQuestion, greedy());
  CHECK(full.ids == ids_of("{1+2}["));
  CHECK(full.mask == mask_of("111110"));
  CHECK(full.stop == StopReason::context);
}

TEST_CASE("bos ends a sample too") {
  EngineFixture f({"ab"});
  f.backend.model().scripts[0].push_back(kBos);
  const Sample sample = one(f, kQuestion, greedy());
  CHECK(sample.ids == Ids{'a', 'b', kBos});
  CHECK(sample.stop == StopReason::stop_token);
}

TEST_CASE("a stop token as the last allowed one counts as a stop") {
  EngineFixture f({"ab."});
  CHECK(one(f, kQuestion, greedy(3)).stop == StopReason::stop_token);
  CHECK(one(f, kQuestion, greedy(2)).stop == StopReason::max_tokens);
}

TEST_CASE("raw: neither stop tokens nor tools") {
  EngineFixture f({"a.{1+1}b"});
  GenerateOptions options = greedy(8);
  options.raw = true;
  const Sample sample = one(f, kQuestion, options);
  CHECK(sample.ids == ids_of("a.{1+1}b"));
  CHECK(sample.mask == Mask(8, 1));
}
