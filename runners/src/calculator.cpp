#include "nanochat_x/calculator.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <exception>

#include "calculator_arithmetic.h"
#include "calculator_count.h"

namespace nanochat_x {
namespace {

// Within this length every operation takes well under nanochat's three seconds: no number has more digits than the
// expression. nanochat's own expressions are bound by the model's context, which is far shorter.
constexpr std::size_t kMaxLength = 128 * 1024;

constexpr std::string_view kArithmetic = "0123456789*+-/.() ";
constexpr std::string_view kText = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'\"()._ ";
constexpr std::array<std::string_view, 17> kForbidden = {"__",   "import",  "exec",      "eval",    "compile", "open",
                                                         "file", "input",   "raw_input", "globals", "locals",  "vars",
                                                         "dir",  "getattr", "setattr",   "delattr", "hasattr"};

bool consists_of(std::string_view text, std::string_view characters) {
  return text.find_first_not_of(characters) == std::string_view::npos;
}

bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

bool holds_forbidden_word(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return std::any_of(kForbidden.begin(), kForbidden.end(), [&](std::string_view word) { return contains(text, word); });
}

/// nanochat's gate in front of Python's eval, and what stands for eval behind it.
std::optional<std::string> evaluate(const std::string& expression) {
  if (consists_of(expression, kArithmetic)) {
    return contains(expression, "**") ? std::nullopt : internal::evaluate_arithmetic(expression);
  }
  if (!consists_of(expression, kText) || holds_forbidden_word(expression)) return std::nullopt;
  return contains(expression, ".count(") ? internal::evaluate_count(expression) : std::nullopt;
}

}  // namespace

std::optional<std::string> calculate(std::string_view expression) {
  if (expression.size() > kMaxLength) return std::nullopt;
  try {
    std::string without_commas(expression);
    std::erase(without_commas, ',');
    return evaluate(without_commas);
  } catch (const std::exception&) {  // out of memory
    return std::nullopt;
  }
}

}  // namespace nanochat_x
