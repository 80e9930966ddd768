#pragma once

#include <string>
#include <string_view>

#include "nanochat_x/tokenizer.h"
#include "nanochat_x/utf8.h"

namespace nanochat_x::app {

/// Turns a reply's tokens into text for people, piece by piece: whole characters only; the calculator's expression and
/// result as "[9325+33 = 9358]"; other special tokens by name, as nanochat's own program prints them, except the one
/// that ends the reply.
class ReplyPrinter {
 public:
  /// `styled`: the calculator's part is dimmed by ANSI escapes.
  ReplyPrinter(const Tokenizer& tokenizer, bool styled) : tokenizer_(&tokenizer), styled_(styled) {}

  /// The text that one more token adds; `sampled` false: a tool forced it.
  std::string push(TokenId id, bool sampled);
  /// Ends the reply.
  std::string finish();
  /// What gives the terminal back its own style if the reply breaks off here; empty where nothing is dimmed.
  std::string_view plain() const { return styled_ && place_ != Place::text ? "\x1b[0m" : ""; }

 private:
  enum class Place { text, expression, after_expression, result };
  std::string open();
  std::string close();
  std::string spaced(std::string piece);
  std::string push_special(TokenId id);

  const Tokenizer* tokenizer_;
  bool styled_;
  Utf8Stream characters_;
  Place place_ = Place::text;
  bool after_bracket_ = false;
};

}  // namespace nanochat_x::app
