#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "nanochat_x/backend.h"
#include "nanochat_x/engine.h"

namespace nanochat_x {

/// Throws Error if the linked backend or this machine cannot run the bundle.
void check_runnable(const Bundle& bundle);

/// Called with new text as soon as it is known: always whole UTF-8 characters.
using OnText = std::function<void(std::string_view)>;

/// A nanochat model from a bundle, ready to run: the whole public API in one class. Not thread-safe.
///
///     nanochat_x::NanoChat model("nanochat-demo-aoti");
///     std::string text = model.generate("The capital of France", 32, 0.0);
///     nanochat_x::Logits logits = model.forward(model.tokenizer().encode(text));
///
/// Linked against exactly one backend library (nanochat_x::aoti). Every function throws nanochat_x::Error.
class NanoChat {
 public:
  /// Opens a bundle: checks hashes and machine, then loads programs and weights. A number of threads may be set for the
  /// whole process (libtorch has one pool of threads), so for every model in it.
  explicit NanoChat(const std::filesystem::path& bundle, const BackendOptions& options = {});
  ~NanoChat();
  NanoChat(NanoChat&&) noexcept;
  NanoChat& operator=(NanoChat&&) noexcept;

  const Manifest& manifest() const;
  const Tokenizer& tokenizer() const;
  Backend& backend();
  Engine& engine();

  /// Logits `[batch, T, vocab]` of `batch` sequences of T tokens (`ids` is `[batch, T]`), through the program without a
  /// cache.
  Logits forward(const std::vector<TokenId>& ids, std::int64_t batch = 1);
  /// Continues a text (<|bos|> is put in front) and returns the new text, without the stop token that ended it.
  /// `on_text` gets the same text piece by piece. More options: `engine()`.
  std::string generate(std::string_view prompt, std::int64_t max_tokens = 256, double temperature = 0.6,
                       std::int64_t top_k = 50, const OnText& on_text = {});
  /// The reply to a user's text in a new conversation. More turns: `Conversation` and `engine()`.
  std::string reply(std::string_view user, std::int64_t max_tokens = 256, double temperature = 0.6,
                    std::int64_t top_k = 50, const OnText& on_text = {});
  /// A batch of sequences with a KV cache, for one's own loop.
  Session new_session(std::int64_t rows = 1);

 private:
  struct Impl;
  std::string run(const std::vector<TokenId>& prompt, const GenerateOptions& options, const OnText& on_text);
  std::unique_ptr<Impl> impl_;
};

}  // namespace nanochat_x
