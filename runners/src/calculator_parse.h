#pragma once

#include <cstddef>
#include <string_view>

namespace nanochat_x::internal {

/// Parentheses that CPython lets be open at once.
constexpr int kMaxParentheses = 200;

/// A place in an expression. Every function first passes over spaces.
class Cursor {
 public:
  explicit Cursor(std::string_view text) : text_(text) {}

  bool at_end() {
    skip_spaces();
    return position_ == text_.size();
  }
  /// The next character; '\0' at the end.
  char peek() { return at_end() ? '\0' : text_[position_]; }
  bool take(char wanted) {
    if (peek() != wanted) return false;
    ++position_;
    return true;
  }
  bool take(std::string_view wanted) {
    skip_spaces();
    if (text_.substr(position_, wanted.size()) != wanted) return false;
    position_ += wanted.size();
    return true;
  }
  /// Digits, with a '.' before, within or after; empty if there are none here.
  std::string_view take_number();
  /// Letters, digits and underscores; empty if there are none here.
  std::string_view take_word();
  /// What is left, from the next character that is no space.
  std::string_view rest() {
    skip_spaces();
    return text_.substr(position_);
  }
  void advance(std::size_t count) { position_ += count; }

 private:
  void skip_spaces() {
    while (position_ < text_.size() && text_[position_] == ' ') ++position_;
  }

  std::string_view text_;
  std::size_t position_ = 0;
};

}  // namespace nanochat_x::internal
