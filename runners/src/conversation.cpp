#include <string_view>
#include <vector>

#include "nanochat_x/engine.h"

namespace nanochat_x {

Conversation::Conversation(const Tokenizer& tokenizer) : tokenizer_(&tokenizer), ids_{tokenizer.special().bos} {}

void Conversation::add_user(std::string_view text) {
  const std::vector<TokenId> encoded = tokenizer_->encode(text);  // may throw: nothing is changed yet
  const SpecialTokens& special = tokenizer_->special();
  ids_.push_back(special.user_start);
  ids_.insert(ids_.end(), encoded.begin(), encoded.end());
  ids_.push_back(special.user_end);
  ids_.push_back(special.assistant_start);
}

void Conversation::add_reply(const std::vector<TokenId>& ids) {
  ids_.insert(ids_.end(), ids.begin(), ids.end());
  const TokenId end = tokenizer_->special().assistant_end;
  if (ids.empty() || ids.back() != end) ids_.push_back(end);
}

void Conversation::clear() { ids_.assign(1, tokenizer_->special().bos); }

}  // namespace nanochat_x
