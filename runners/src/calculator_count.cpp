#include "calculator_count.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <variant>

#include "calculator_parse.h"

namespace nanochat_x::internal {
namespace {

/// A string, or what `.count` gave.
using Term = std::variant<std::string, std::size_t>;

/// Non-overlapping occurrences, as Python's `str.count` (of ASCII text).
std::size_t count_occurrences(std::string_view text, std::string_view wanted) {
  if (wanted.empty()) return text.size() + 1;
  std::size_t count = 0;
  for (std::size_t at = text.find(wanted); at != std::string_view::npos; at = text.find(wanted, at + wanted.size())) {
    ++count;
  }
  return count;
}

/// True for the prefixes of string literals that mean nothing to a text without backslashes and braces.
bool is_plain_prefix(std::string_view word) {
  static constexpr std::array<std::string_view, 5> kPrefixes = {"r", "u", "f", "fr", "rf"};
  std::string lower(word);
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return std::find(kPrefixes.begin(), kPrefixes.end(), lower) != kPrefixes.end();
}

class CountParser {
 public:
  explicit CountParser(std::string_view text) : cursor_(text) {}

  std::optional<std::string> run() {
    const auto term = primary();
    if (!term || !cursor_.at_end()) return std::nullopt;
    if (const auto* count = std::get_if<std::size_t>(&*term)) return std::to_string(*count);
    return std::get<std::string>(*term);
  }

 private:
  /// atom ('.' 'count' '(' primary ')')?
  std::optional<Term> primary() {
    auto term = atom();
    if (!term || !cursor_.take('.')) return term;
    const auto* text = std::get_if<std::string>(&*term);
    if (text == nullptr || cursor_.take_word() != "count" || !cursor_.take('(')) return std::nullopt;
    const auto argument = group();
    const auto* wanted = argument ? std::get_if<std::string>(&*argument) : nullptr;
    if (wanted == nullptr) return std::nullopt;
    return count_occurrences(*text, *wanted);
  }

  std::optional<Term> atom() { return cursor_.take('(') ? group() : strings(); }

  /// What follows a "(".
  std::optional<Term> group() {
    if (++open_parentheses_ > kMaxParentheses) return std::nullopt;
    auto inner = primary();
    --open_parentheses_;
    return cursor_.take(')') ? inner : std::nullopt;
  }

  /// One or more string literals, which Python joins.
  std::optional<Term> strings() {
    std::string joined;
    bool any = false;
    for (;; any = true) {
      const std::string_view before = cursor_.rest();
      const std::size_t word = cursor_.take_word().size();
      const bool quoted = word < before.size() && (before[word] == '\'' || before[word] == '"');
      if (word > 0 && !(quoted && is_plain_prefix(before.substr(0, word)))) return std::nullopt;
      if (!quoted) break;
      const auto content = string_content(before.substr(word));
      if (!content) return std::nullopt;
      joined += *content;
    }
    if (!any) return std::nullopt;
    return joined;
  }

  /// The content of the literal at the start of `text`, which is what the cursor stands on. Takes it.
  std::optional<std::string_view> string_content(std::string_view text) {
    const std::string_view triple = text.substr(0, 3);
    const bool is_triple = triple == "'''" || triple == "\"\"\"";
    const std::string_view quote = text.substr(0, is_triple ? 3 : 1);
    const std::size_t end = text.find(quote, quote.size());
    if (end == std::string_view::npos) return std::nullopt;
    cursor_.advance(end + quote.size());
    return text.substr(quote.size(), end - quote.size());
  }

  Cursor cursor_;
  int open_parentheses_ = 0;
};

}  // namespace

std::optional<std::string> evaluate_count(std::string_view expression) { return CountParser(expression).run(); }

}  // namespace nanochat_x::internal
