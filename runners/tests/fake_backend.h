#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "nanochat_x/backend.h"
#include "nanochat_x/bundle.h"
#include "nanochat_x/tokenizer.h"

namespace nanochat_x::test {

/// What the toy model predicts. Without scripts every logit is a pseudo-random number from the whole history. With
/// them, the token after the k-th one behind the last `anchor` is the k-th of a script (the n-th anchor of the text
/// takes the n-th script, around and around): its logit is far above the others.
struct FakeModel {
  std::int64_t vocab_size = 32;
  std::int64_t anchor = -1;
  std::vector<std::vector<TokenId>> scripts = {};
  int step_ms = 0;       ///< time that a step takes
  int fail_at_step = 0;  ///< the n-th step throws; 0: none
  bool nan_logits = false;
};

/// What a step throws that was told to fail: as a runtime's own exception, no Error.
class RuntimeFailed : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A backend whose logits depend on every token, its place and the token that was said to stand before it, all read
/// back from its own cache: a mistake in what is fed, kept, copied or rolled back changes them.
class FakeBackend : public Backend {
 public:
  explicit FakeBackend(FakeModel model) : model_(std::move(model)) {}

  Logits forward(std::span<const std::int64_t> ids, std::int64_t batch, std::int64_t length) override;
  Logits step(const Step& step, Cache& cache) override;
  std::unique_ptr<Cache> new_cache(std::int64_t rows, std::int64_t capacity) override;

  FakeModel& model() { return model_; }
  // what was asked of it
  std::int64_t steps = 0;
  std::int64_t tokens = 0;  ///< fed, padding included
  std::vector<std::int64_t> lengths, batches;
  std::int64_t largest_capacity = 0;  ///< of the caches it was given

 private:
  struct Entry {
    std::int64_t id, previous, position;
  };
  class FakeCache;
  std::vector<float> logits_after(std::span<const Entry> history) const;

  FakeModel model_;
};

/// Sizes that fit the toy model.
Manifest fake_manifest(std::int64_t vocab_size, std::int64_t max_seq_len);

/// A tokenizer of the 256 bytes and nanochat's nine special tokens: ids 256 (<|bos|>) to 264.
Tokenizer byte_tokenizer();
/// Its tokenizer.json.
std::string byte_tokenizer_json();

}  // namespace nanochat_x::test
