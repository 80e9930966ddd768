#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "error_of.h"
#include "fake_backend.h"
#include "fake_bundle.h"
#include "nanochat_x/engine.h"

// What the tests of the engine share.

namespace nanochat_x::test {

using Ids = std::vector<TokenId>;
using Mask = std::vector<std::uint8_t>;

// The byte tokenizer's special tokens
constexpr TokenId kBos = 256, kAssistantStart = 259, kAssistantEnd = 260;
constexpr std::int64_t kVocab = 265;

inline Mask mask_of(std::string_view digits) {
  Mask mask;
  for (const char c : digits) mask.push_back(c == '1' ? 1 : 0);
  return mask;
}

struct EngineFixture {
  explicit EngineFixture(std::vector<std::string> scripts = {}, std::int64_t max_seq_len = 400)
      : manifest(fake_manifest(kVocab, max_seq_len)) {
    backend.model().anchor = kAssistantStart;
    for (const auto& script : scripts) backend.model().scripts.push_back(ids_of(script));
  }
  Generation generate(const Ids& prompt, const GenerateOptions& options, const OnToken& on_token = {}) {
    return engine.generate(prompt, options, on_token);
  }
  FakeBackend backend{{.vocab_size = kVocab}};
  Manifest manifest;
  Tokenizer tokenizer = byte_tokenizer();
  Engine engine{backend, manifest, tokenizer};
};

inline GenerateOptions greedy(std::int64_t max_tokens = 64) {
  GenerateOptions options;
  options.max_tokens = max_tokens;
  options.sampling.temperature = 0;
  return options;
}

inline GenerateOptions random_options(std::int64_t max_tokens, std::int64_t num_samples, std::uint64_t seed = 42) {
  GenerateOptions options;
  options.max_tokens = max_tokens;
  options.num_samples = num_samples;
  options.sampling = {.temperature = 1, .top_k = 0, .top_p = 1, .seed = seed};
  options.raw = true;
  return options;
}

inline const Ids kQuestion = {kBos, 257, 'h', 'i', 258, kAssistantStart};

// One sample from first principles: no cache, no batch, no tools.
inline Ids plain_sample(FakeBackend& backend, Ids ids, const GenerateOptions& options, std::uint64_t index) {
  Sampler sampler(options.sampling, index);
  const auto prompt = std::ssize(ids);
  for (std::int64_t i = 0; i < options.max_tokens; ++i) {
    const auto logits = backend.forward(ids, 1, std::ssize(ids));
    ids.push_back(sampler.sample(logits.at(0, std::ssize(ids) - 1)));
  }
  return {ids.begin() + prompt, ids.end()};
}

inline Sample one(EngineFixture& f, const Ids& prompt, const GenerateOptions& options) {
  Generation generation = f.generate(prompt, options);
  return generation.samples.at(0);
}

}  // namespace nanochat_x::test
