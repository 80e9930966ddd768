#include <doctest/doctest.h>

#include <atomic>
#include <numeric>

#include "engine_fixture.h"

using namespace nanochat_x::test;
using nanochat_x::GenerateOptions;
using nanochat_x::Generation;
using nanochat_x::Sample;
using nanochat_x::StopReason;
using nanochat_x::TokenId;

TEST_CASE("greedy decoding equals the largest logit of the whole sequence, token by token") {
  EngineFixture f;
  GenerateOptions options = greedy(40);
  options.raw = true;
  const Sample sample = one(f, kQuestion, options);
  CHECK(sample.ids == plain_sample(f.backend, kQuestion, options, 0));
  CHECK(sample.mask == Mask(40, 1));
  CHECK(sample.stop == StopReason::max_tokens);
}

TEST_CASE("sampled decoding: each sample is what it would be alone") {
  for (const std::int64_t n : {1, 2, 5}) {
    EngineFixture f;
    const GenerateOptions options = random_options(12, n);
    const Generation generation = f.generate(kQuestion, options);
    REQUIRE(std::ssize(generation.samples) == n);
    for (std::int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<std::size_t>(i);
      CHECK(generation.samples[at].ids == plain_sample(f.backend, kQuestion, options, at));
    }
    CHECK(f.backend.lengths[0] == std::ssize(kQuestion));  // one prefill
    CHECK(f.backend.batches[0] == 1);
    CHECK(f.backend.steps == 12);
    CHECK(generation.timing.new_tokens == 12 * n);
    CHECK(generation.timing.prompt_tokens == std::ssize(kQuestion));
  }
  EngineFixture f;
  CHECK(one(f, kQuestion, random_options(12, 1, 1)).ids != one(f, kQuestion, random_options(12, 1, 2)).ids);
}

TEST_CASE("rows that ended leave the batch and the others go on unchanged") {
  // a tiny vocabulary would be another tokenizer: instead a high temperature and many samples, so that some meet a
  // stop token (2 of 265 ids) and others do not
  EngineFixture f;
  GenerateOptions options = random_options(60, 12);
  options.raw = false;
  const Generation together = f.generate(kQuestion, options);
  int stopped = 0;
  for (std::size_t i = 0; i < together.samples.size(); ++i) {
    GenerateOptions raw = options;
    raw.raw = true;
    const Sample& sample = together.samples[i];
    CHECK(sample.ids.size() == sample.mask.size());
    const Ids alone = plain_sample(f.backend, kQuestion, raw, i);
    const bool forced = std::accumulate(sample.mask.begin(), sample.mask.end(), std::size_t{0}) != sample.mask.size();
    if (forced) continue;  // the calculator answered by chance
    REQUIRE(sample.ids.size() <= alone.size());
    CHECK(std::equal(sample.ids.begin(), sample.ids.end(), alone.begin()));
    const TokenId last = sample.ids.back();
    if (sample.stop == StopReason::stop_token) {
      ++stopped;
      CHECK((last == kAssistantEnd || last == kBos));
    } else {
      CHECK(sample.ids.size() == 60);
    }
  }
  CHECK(stopped > 0);
  CHECK(stopped < 12);
  CHECK(f.backend.batches.back() < 12);
}

TEST_CASE("no tokens wanted: nothing is computed") {
  EngineFixture f;
  const Generation generation = f.generate(kQuestion, greedy(0));
  CHECK(generation.samples.size() == 1);
  CHECK(generation.samples[0].ids.empty());
  CHECK(generation.samples[0].stop == StopReason::max_tokens);
  CHECK(f.backend.steps == 0);
}

TEST_CASE("the context's limit") {
  EngineFixture f({}, 20);
  GenerateOptions options = greedy(100);
  options.raw = true;
  const Sample sample = one(f, kQuestion, options);
  CHECK(sample.ids.size() == 15);  // 14 are fed, the last one is not
  CHECK(sample.stop == StopReason::context);
  options.max_tokens = 15;
  CHECK(one(f, kQuestion, options).stop == StopReason::max_tokens);
  const Ids full(20, 7);
  const Sample last = one(f, full, greedy());
  CHECK(last.ids.size() == 1);
  CHECK(contains(error_of([&] { f.generate(Ids(21, 7), greedy()); }),
                 "prompt of 21 tokens is longer than the model's context of 20"));
  options.num_samples = 3;
  options.max_tokens = 100;
  for (const Sample& s : f.generate(kQuestion, options).samples) CHECK(s.stop == StopReason::context);
}

TEST_CASE("a long prompt is prefilled in pieces") {
  EngineFixture f({}, 1000);
  Ids prompt(600);
  for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<TokenId>(i * 7 % 256);
  GenerateOptions options = greedy(3);
  options.raw = true;
  const Sample sample = one(f, prompt, options);
  CHECK(f.backend.lengths == Ids{256, 256, 88, 1, 1});
  CHECK(sample.ids == plain_sample(f.backend, prompt, options, 0));
}

TEST_CASE("on_token tells every token as it comes") {
  EngineFixture f({"a{1+2}___."});
  std::vector<Sample> told(3);
  GenerateOptions options = greedy();
  options.num_samples = 3;
  const Generation generation = f.generate(kQuestion, options, [&](std::int64_t sample, TokenId id, bool sampled) {
    told[static_cast<std::size_t>(sample)].ids.push_back(id);
    told[static_cast<std::size_t>(sample)].mask.push_back(sampled ? 1 : 0);
  });
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(told[i].ids == generation.samples[i].ids);
    CHECK(told[i].mask == generation.samples[i].mask);
    CHECK(told[i].ids == ids_of("a{1+2}[3]."));
  }
}

TEST_CASE("an interrupt ends after the step, and what there is stays") {
  EngineFixture f;
  std::atomic<bool> interrupt = false;
  GenerateOptions options = greedy(50);
  options.raw = true;
  options.interrupt = &interrupt;
  const Generation cut = f.generate(kQuestion, options, [&, n = 0](auto, auto, auto) mutable {
    if (++n == 4) interrupt = true;
  });
  CHECK(cut.samples[0].ids.size() == 4);
  CHECK(cut.samples[0].stop == StopReason::interrupt);
  const auto steps = f.backend.steps;
  const Generation none = f.generate(kQuestion, options);  // set before: not even a prefill
  CHECK(none.samples[0].ids.empty());
  CHECK(none.samples[0].stop == StopReason::interrupt);
  CHECK(f.backend.steps == steps);
  interrupt = false;
  options.max_tokens = 6;
  CHECK(one(f, kQuestion, options).ids == plain_sample(f.backend, kQuestion, options, 0));
}

TEST_CASE("what cannot be meant is refused before anything is computed") {
  EngineFixture f;
  const auto refused = [&](const Ids& prompt, const GenerateOptions& options, const std::string& part) {
    CHECK_MESSAGE(contains(error_of([&] { f.generate(prompt, options); }), part), part);
    CHECK(f.backend.steps == 0);
  };
  refused({}, greedy(), "prompt is empty");
  refused({1, 2, kVocab}, greedy(), "token id 265 at position 2 of the prompt");
  refused({-1}, greedy(), "token id -1 at position 0");
  refused({1}, greedy(-1), "max_tokens");
  GenerateOptions options = greedy();
  options.num_samples = 0;
  refused({1}, options, "num_samples");
  options = greedy();
  options.sampling.top_p = 0;
  refused({1}, options, "top_p");
}

TEST_CASE("NaN logits are an error, not a token") {
  EngineFixture f;
  f.backend.model().nan_logits = true;
  CHECK(contains(error_of([&] { f.generate(kQuestion, greedy()); }), "NaN"));
}
