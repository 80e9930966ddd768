#include "reply_printer.h"

#include <optional>
#include <utility>

namespace nanochat_x::app {

std::string ReplyPrinter::open() {
  place_ = Place::expression;
  return styled_ ? "\x1b[2m[" : "[";
}

std::string ReplyPrinter::close() {
  if (place_ == Place::text) return "";
  place_ = Place::text;
  after_bracket_ = true;
  return styled_ ? "]\x1b[0m" : "]";
}

// The model goes on right behind its tool's tokens; behind a bracket, a word wants a space.
std::string ReplyPrinter::spaced(std::string piece) {
  if (piece.empty()) return piece;
  const auto first = static_cast<unsigned char>(piece.front());
  const unsigned char letter = first | 0x20;
  const bool word = (letter >= 'a' && letter <= 'z') || (first >= '0' && first <= '9') || first >= 0x80;
  if (std::exchange(after_bracket_, false) && word) piece.insert(0, 1, ' ');
  return piece;
}

std::string ReplyPrinter::push(TokenId id, bool sampled) {
  std::string text;
  if (place_ == Place::after_expression) {
    if (id == tokenizer_->special().output_start && !sampled) {
      place_ = Place::result;
      return " = ";
    }
    text = close();  // no result: the expression stands alone
  }
  const std::string_view bytes = tokenizer_->token_bytes(id);
  if (tokenizer_->special_id(bytes) != std::optional(id)) return text + spaced(characters_.push(bytes));
  return text + characters_.finish() + push_special(id);
}

std::string ReplyPrinter::push_special(TokenId id) {
  const SpecialTokens& special = tokenizer_->special();
  if (id == special.assistant_end || id == special.bos) return "";
  if (id == special.python_start && place_ == Place::text) return open();
  if (id == special.python_end && place_ == Place::expression) {
    place_ = Place::after_expression;
    return "";
  }
  if (id == special.output_end && place_ == Place::result) return close();
  after_bracket_ = false;
  return std::string(tokenizer_->token_bytes(id));
}

std::string ReplyPrinter::finish() {
  std::string text = characters_.finish();
  return text + close();
}

}  // namespace nanochat_x::app
