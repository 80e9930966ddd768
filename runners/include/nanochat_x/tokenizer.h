#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace nanochat_x {

using TokenId = std::int64_t;

/// Ids of nanochat's special tokens.
struct SpecialTokens {
  TokenId bos, user_start, user_end, assistant_start, assistant_end, python_start, python_end, output_start, output_end;
};

/// Byte-level BPE with nanochat's split pattern, read from a bundle's tokenizer.json (docs/bundle.md has the format).
/// Immutable after construction: one object may be used from several threads.
class Tokenizer {
 public:
  /// Throws Error when the file cannot be read or is not a tokenizer.
  static Tokenizer load(const std::filesystem::path& file);
  /// The same from the JSON text; `where` names it in errors.
  static Tokenizer parse(std::string_view json, const std::string& where);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  /// Mergeable and special tokens together.
  std::int64_t vocab_size() const;
  const SpecialTokens& special() const;
  /// Id of a special token by its name, as "<|bos|>"; nothing if there is none of that name.
  std::optional<TokenId> special_id(std::string_view name) const;

  /// Ordinary text to ids: the name of a special token in it is text like any other. Throws Error if not UTF-8.
  std::vector<TokenId> encode(std::string_view text) const;
  /// The bytes of one token (a special token: its name). Throws Error if the id is out of range.
  std::string_view token_bytes(TokenId id) const;
  /// Whether `byte_count` knows: a file that older versions wrote does not tell.
  bool counts_bytes() const;
  /// What one token counts in bits per byte (nanochat's `token_bytes`): the bytes of its text, 0 for a special token.
  /// Throws Error if the id is out of range, or the file does not tell.
  std::int64_t byte_count(TokenId id) const;
  /// The concatenated bytes of all; may be no valid UTF-8.
  std::string decode_bytes(std::span<const TokenId> ids) const;
  /// `replace_invalid_utf8(decode_bytes(ids))`: what tiktoken's `decode` gives.
  std::string decode(std::span<const TokenId> ids) const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<const Impl> impl);
  std::size_t checked_index(TokenId id) const;
  std::unique_ptr<const Impl> impl_;
};

}  // namespace nanochat_x
