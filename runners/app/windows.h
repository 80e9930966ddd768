#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "nanochat_x/bundle.h"
#include "nanochat_x/tokenizer.h"

// Texts, cut into the windows that `eval` computes and `tokenize` prints.

namespace nanochat_x::app {

/// --text or --docs, and --context.
struct TextOptions {
  std::string text, docs;    ///< a file's name; one of the two
  std::int64_t context = 0;  ///< 0: the bundle's own
};
void add_text_options(CLI::App& verb, TextOptions& options);

struct Texts {
  std::vector<std::string> documents;
  bool whole = false;  ///< every window of a document, not the first alone
  std::string where;   ///< the file, for errors
};
/// Throws Error for a file that cannot be read, is not UTF-8 or JSON of the form, or holds no text.
Texts read_texts(const TextOptions& options);

/// Predicted tokens of a window at most: the option, or what the model was trained on and the programs take. Throws
/// Error if the programs take fewer than the option wants.
std::int64_t context_of(const TextOptions& options, const Manifest& manifest);

/// <|bos|>, and tokens that are predicted, each from all before it.
struct Window {
  std::size_t document = 0;  ///< index in Texts::documents
  std::vector<TokenId> ids;  ///< 2 to context + 1
};
/// A document's tokens in consecutive windows of `context` tokens, each with <|bos|> in front; unless `whole`, the
/// first alone. A document without a token has none. Throws Error if there is nothing to predict at all.
std::vector<Window> windows_of(const Texts& texts, const Tokenizer& tokenizer, std::int64_t context);

}  // namespace nanochat_x::app
