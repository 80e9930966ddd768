#include "bpe.h"

#include <algorithm>
#include <functional>
#include <queue>
#include <utility>

#include "nanochat_x/error.h"

namespace nanochat_x::internal {
namespace {

constexpr TokenId kNone = -1;

/// A run of bytes that is one token by now; `pair` is the token that it would form with the next part.
struct Part {
  std::size_t previous, next;  // first bytes of the neighbours; the piece's size: none
  TokenId id;
  TokenId pair;
};

using Merge = std::pair<TokenId, std::size_t>;  // token to form, first byte of its left part
using MergeQueue = std::priority_queue<Merge, std::vector<Merge>, std::greater<>>;

}  // namespace

Bpe::Bpe(std::vector<std::string> tokens) : tokens_(std::move(tokens)) {
  ids_.reserve(tokens_.size());
  for (std::size_t id = 0; id < tokens_.size(); ++id) {
    if (tokens_[id].empty()) throw Error("token " + std::to_string(id) + " is empty");
    const auto [other, is_new] = ids_.emplace(tokens_[id], static_cast<TokenId>(id));
    if (!is_new) {
      throw Error("tokens " + std::to_string(other->second) + " and " + std::to_string(id) + " have the same bytes");
    }
    longest_ = std::max(longest_, tokens_[id].size());
  }
  for (std::size_t byte = 0; byte < byte_ids_.size(); ++byte) {
    const char text = static_cast<char>(static_cast<unsigned char>(byte));
    byte_ids_[byte] = find({&text, 1});
    if (byte_ids_[byte] == kNone) throw Error("no token for the single byte " + std::to_string(byte));
  }
}

TokenId Bpe::find(std::string_view bytes) const {
  if (bytes.size() > longest_) return kNone;
  const auto found = ids_.find(bytes);
  return found == ids_.end() ? kNone : found->second;
}

void Bpe::encode(std::string_view piece, std::vector<TokenId>& out) const {
  if (const TokenId whole = find(piece); whole != kNone) {
    out.push_back(whole);
    return;
  }
  const std::size_t end = piece.size();
  std::vector<Part> parts(end);
  std::vector<Merge> merges;
  merges.reserve(end);
  for (std::size_t i = 0; i < end; ++i) {
    const TokenId pair = i + 1 < end ? find(piece.substr(i, 2)) : kNone;
    parts[i] = {i == 0 ? end : i - 1, i + 1, byte_ids_[static_cast<unsigned char>(piece[i])], pair};
    if (pair != kNone) merges.emplace_back(pair, i);
  }
  MergeQueue queue(std::greater<>(), std::move(merges));

  const auto look_up_pair = [&](std::size_t at) {
    Part& part = parts[at];
    part.pair = part.next == end ? kNone : find(piece.substr(at, parts[part.next].next - at));
    if (part.pair != kNone) queue.emplace(part.pair, at);
  };
  while (!queue.empty()) {
    const auto [token, at] = queue.top();
    queue.pop();
    Part& part = parts[at];
    if (part.pair != token) continue;  // from before a neighbour was merged
    Part& right = parts[part.next];
    part.id = token;
    part.next = right.next;
    right.pair = kNone;  // gone
    if (part.next != end) parts[part.next].previous = at;
    look_up_pair(at);
    if (part.previous != end) look_up_pair(part.previous);
  }
  for (std::size_t at = 0; at < end; at = parts[at].next) out.push_back(parts[at].id);
}

}  // namespace nanochat_x::internal
