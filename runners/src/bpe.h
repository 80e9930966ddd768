#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "nanochat_x/tokenizer.h"

namespace nanochat_x::internal {

/// Byte-pair merging by rank. A token's id is its rank. Immutable after construction.
class Bpe {
 public:
  /// `tokens[id]` are the bytes of token id. Throws Error on an empty or a repeated token and if one of the 256 single
  /// bytes is none.
  explicit Bpe(std::vector<std::string> tokens);
  Bpe(const Bpe&) = delete;  // ids_ points into tokens_
  Bpe& operator=(const Bpe&) = delete;

  std::size_t size() const { return tokens_.size(); }
  const std::string& bytes(std::size_t id) const { return tokens_[id]; }

  /// Appends the ids of one piece: its own id if it is a token, else its bytes merged pair by pair, the lowest rank
  /// first and the leftmost of equals, until no two neighbours form a token. O(n log n) in the length of the piece.
  void encode(std::string_view piece, std::vector<TokenId>& out) const;

 private:
  TokenId find(std::string_view bytes) const;

  std::vector<std::string> tokens_;
  std::unordered_map<std::string_view, TokenId> ids_;
  std::array<TokenId, 256> byte_ids_{};
  std::size_t longest_ = 0;
};

}  // namespace nanochat_x::internal
