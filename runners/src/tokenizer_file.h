#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "nanochat_x/tokenizer.h"

namespace nanochat_x::internal {

/// What tokenizer.json holds (docs/bundle.md).
struct TokenizerFile {
  std::string pattern;
  std::vector<std::string> tokens;                ///< bytes of each mergeable token, by id
  std::map<std::string, TokenId> special_tokens;  ///< ids follow those of `tokens` without a gap
  std::vector<std::int64_t> token_bytes;          ///< of every id; none in files of before there were any
};

/// Reads the JSON text and checks its form. Throws Error that begins with `where`.
TokenizerFile parse_tokenizer_file(std::string_view json, const std::string& where);

/// The nine of nanochat's special tokens. Throws Error naming one that is missing.
SpecialTokens find_special_tokens(const std::map<std::string, TokenId>& tokens);

}  // namespace nanochat_x::internal
