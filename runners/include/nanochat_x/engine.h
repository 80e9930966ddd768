#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "nanochat_x/sampler.h"
#include "nanochat_x/session.h"
#include "nanochat_x/tokenizer.h"

namespace nanochat_x {

struct GenerateOptions {
  std::int64_t max_tokens = 256;  ///< new tokens of each sample, forced ones included
  std::int64_t num_samples = 1;
  SamplingParams sampling;
  bool raw = false;                              ///< no stop tokens and no tools
  const std::atomic<bool>* interrupt = nullptr;  ///< set from elsewhere (a signal): generation ends after the step

  /// Throws Error naming the field that is out of range.
  void validate() const;
};

enum class StopReason { stop_token, max_tokens, context, interrupt };
const char* to_string(StopReason reason);

/// One continuation.
struct Sample {
  std::vector<TokenId> ids;        ///< the new tokens; a stop token that ended it is the last
  std::vector<std::uint8_t> mask;  ///< 1: sampled, 0: forced by a tool
  StopReason stop = StopReason::max_tokens;
};

struct Timing {
  std::int64_t prompt_tokens = 0;  ///< length of the prompt
  std::int64_t reused_tokens = 0;  ///< of these, how many were in the cache from the call before
  std::int64_t new_tokens = 0;     ///< of all samples
  double prefill_s = 0;            ///< seconds until the logits that the first token is drawn from
  double decode_s = 0;             ///< seconds from there to the end
  double tokens_per_s = 0;         ///< of decoding: the first token of a sample costs no step and is not counted
};

struct Generation {
  std::vector<Sample> samples;
  Timing timing;
};

/// Called with each new token of a sample as soon as it is known.
using OnToken = std::function<void(std::int64_t sample, TokenId id, bool sampled)>;

/// nanochat's engine: prefill once, N samples, stop tokens, the calculator's forced tokens, the context's limit.
class Engine {
 public:
  /// Keeps references: all three must outlive the engine.
  Engine(Backend& backend, const Manifest& manifest, const Tokenizer& tokenizer);

  /// Continues `prompt` (1 to max_seq_len ids). A sample's tokens do not depend on `num_samples` (but for roundings
  /// where a backend computes one row by another kernel than several: bfloat16 on a card). The prompt is prefilled
  /// once, whatever num_samples is; with one sample, what the last call left in the cache and the prompt begins with is
  /// not computed again (a conversation's turns). Throws Error, before anything is computed, for an empty or too long
  /// prompt, an id or an option out of range.
  Generation generate(const std::vector<TokenId>& prompt, const GenerateOptions& options, const OnToken& on_token = {});

 private:
  /// The kept session rolled back to what it shares with `prompt`, or a new one.
  Session resume(const std::vector<TokenId>& prompt);

  Backend* backend_;
  const Manifest* manifest_;
  const Tokenizer* tokenizer_;
  std::optional<Session> session_;  // of the last single-sample call, to go on with
};

/// A conversation in nanochat's chat format.
class Conversation {
 public:
  explicit Conversation(const Tokenizer& tokenizer);
  /// Appends a user's turn and the start of the assistant's; `ids()` is then the prompt of the reply. Throws Error, and
  /// changes nothing, if `text` is not UTF-8.
  void add_user(std::string_view text);
  /// Appends a reply's ids; adds <|assistant_end|> if they do not end in it (cut short, or ended by <|bos|>).
  void add_reply(const std::vector<TokenId>& ids);
  const std::vector<TokenId>& ids() const { return ids_; }
  void clear();

 private:
  const Tokenizer* tokenizer_;
  std::vector<TokenId> ids_;
};

}  // namespace nanochat_x
