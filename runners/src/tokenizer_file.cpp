#include "tokenizer_file.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "base64.h"
#include "json_reader.h"
#include "nanochat_x/error.h"
#include "nanochat_x/utf8.h"

namespace nanochat_x::internal {
namespace {

constexpr std::int64_t kVersion = 1;
constexpr std::int64_t kMaxId = 0x7FFFFFFF;
constexpr const char* kRemedy = "lower the checkpoint again";

std::vector<std::string> read_tokens(const ObjectReader& root) {
  std::vector<std::string> tokens;
  for (const std::string& text : root.strings("tokens")) {
    auto bytes = decode_base64(text);
    if (!bytes) root.fail("tokens", "token " + std::to_string(tokens.size()) + " is not base64");
    tokens.push_back(std::move(*bytes));
  }
  return tokens;
}

/// Names and ids; `first_id` is where the ids must begin.
std::map<std::string, TokenId> read_special_tokens(const ObjectReader& root, std::size_t first_id) {
  const ObjectReader reader = root.object("special_tokens");
  std::map<std::string, TokenId> tokens;
  std::vector<TokenId> ids;
  for (const std::string& name : reader.keys()) {
    if (name.empty()) reader.fail("", "one has no name");
    ids.push_back(tokens[name] = reader.integer(name, 0, kMaxId));
  }
  std::sort(ids.begin(), ids.end());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const auto expected = static_cast<TokenId>(first_id + i);
    if (ids[i] == expected) continue;
    reader.fail("", "the ids must follow those of the " + std::to_string(first_id) + " tokens one by one: expected " +
                        std::to_string(expected) + ", found " + std::to_string(ids[i]));
  }
  return tokens;
}

/// What nanochat counts each token's bytes as: their number, or that of the decoded text, where half a character is
/// U+FFFD (three bytes); 0 for a special token.
std::vector<std::int64_t> read_token_bytes(const ObjectReader& root, const TokenizerFile& file) {
  std::vector<std::int64_t> counts;
  if (!root.has("token_bytes")) return counts;
  for (const auto& value : root.array("token_bytes")) {
    if (!value.is_number_integer()) root.fail("token_bytes", "must hold integers alone");
    counts.push_back(value.get<std::int64_t>());
  }
  const std::size_t size = file.tokens.size() + file.special_tokens.size();
  if (counts.size() != size) {
    root.fail("token_bytes",
              "has " + std::to_string(counts.size()) + " numbers for " + std::to_string(size) + " tokens");
  }
  for (std::size_t id = 0; id < size; ++id) {
    const std::string bytes = id < file.tokens.size() ? file.tokens[id] : "";
    if (counts[id] == std::ssize(bytes) || counts[id] == std::ssize(replace_invalid_utf8(bytes))) continue;
    root.fail("token_bytes", "says " + std::to_string(counts[id]) + " for token " + std::to_string(id) +
                                 ", which has " + std::to_string(bytes.size()));
  }
  return counts;
}

}  // namespace

TokenizerFile parse_tokenizer_file(std::string_view json, const std::string& where) {
  const auto value = parse_json(json, where, kRemedy);
  const ObjectReader root(value, where, kRemedy);
  const std::int64_t version = root.integer("version", 1);
  if (version != kVersion) {
    throw Error(where + ": version: is " + std::to_string(version) + ", this program reads " +
                std::to_string(kVersion) + "; use the nanochat_x that wrote it, or " + kRemedy);
  }
  TokenizerFile file;
  file.pattern = root.string("pattern");
  file.tokens = read_tokens(root);
  file.special_tokens = read_special_tokens(root, file.tokens.size());
  file.token_bytes = read_token_bytes(root, file);
  return file;
}

SpecialTokens find_special_tokens(const std::map<std::string, TokenId>& tokens) {
  const auto id_of = [&tokens](const char* name) {
    const auto found = tokens.find(name);
    if (found == tokens.end()) throw Error(std::string("the special token ") + name + " is missing");
    return found->second;
  };
  return {.bos = id_of("<|bos|>"),
          .user_start = id_of("<|user_start|>"),
          .user_end = id_of("<|user_end|>"),
          .assistant_start = id_of("<|assistant_start|>"),
          .assistant_end = id_of("<|assistant_end|>"),
          .python_start = id_of("<|python_start|>"),
          .python_end = id_of("<|python_end|>"),
          .output_start = id_of("<|output_start|>"),
          .output_end = id_of("<|output_end|>")};
}

}  // namespace nanochat_x::internal
