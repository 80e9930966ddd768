#include "calculator_parse.h"

#include <algorithm>

namespace nanochat_x::internal {
namespace {

constexpr std::string_view kDigits = "0123456789";
constexpr std::string_view kWord = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_";

std::size_t run_of(std::string_view characters, std::string_view text) {
  return std::min(text.find_first_not_of(characters), text.size());
}

}  // namespace

std::string_view Cursor::take_number() {
  const std::string_view text = rest();
  std::size_t length = run_of(kDigits, text);
  std::size_t digits = length;
  if (length < text.size() && text[length] == '.') {
    const std::size_t fraction = run_of(kDigits, text.substr(length + 1));
    digits += fraction;
    length += 1 + fraction;
  }
  if (digits == 0) return {};
  advance(length);
  return text.substr(0, length);
}

std::string_view Cursor::take_word() {
  const std::string_view text = rest();
  const std::size_t length = run_of(kWord, text);
  advance(length);
  return text.substr(0, length);
}

}  // namespace nanochat_x::internal
