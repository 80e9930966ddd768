#include "calculator_arithmetic.h"

#include <algorithm>
#include <utility>

#include "calculator_number.h"
#include "calculator_parse.h"

namespace nanochat_x::internal {
namespace {

// CPython refuses expressions that are too deep, and nanochat then has no result. These are the limits of CPython 3.11,
// measured; other versions have others.
//
// The depth of the syntax tree: 3000 less 3 for each Python frame at the call of eval(). nanochat's command line has 6:
// runpy (2), the script, the engine's generator, use_calculator, eval_with_timeout.
constexpr int kMaxTreeDepth = 3000 - 3 * 6;
// The parser's recursion: a parenthesis takes 28 levels, a sign one; running out of them is a MemoryError.
constexpr int kLevelsPerParenthesis = 28, kMaxLevels = 5975;

/// A value and the depth of the syntax tree that it came from.
struct Node {
  Value value;
  int depth = 1;
};

/// Recursive descent over Python's grammar (sum, term, factor, atom), evaluating as it goes. That is what Python does,
/// since whatever fails, by syntax or by value, the calculator has no result.
class ArithmeticParser {
 public:
  explicit ArithmeticParser(std::string_view text) : cursor_(text) {}

  std::optional<std::string> run() {
    const auto node = sum();
    if (!node || !cursor_.at_end()) return std::nullopt;
    return to_text(node->value);
  }

 private:
  std::optional<Node> sum() {
    auto left = term();
    while (left) {
      Operator op;
      if (cursor_.take('+')) {
        op = Operator::add;
      } else if (cursor_.take('-')) {
        op = Operator::subtract;
      } else {
        break;
      }
      left = combine(op, *left, term());
    }
    return left;
  }

  std::optional<Node> term() {
    auto left = factor();
    while (left) {
      Operator op;
      if (cursor_.take('*')) {
        op = Operator::multiply;
      } else if (cursor_.take("//")) {
        op = Operator::floor_divide;
      } else if (cursor_.take('/')) {
        op = Operator::true_divide;
      } else {
        break;
      }
      left = combine(op, *left, factor());
    }
    return left;
  }

  static std::optional<Node> combine(Operator op, const Node& left, const std::optional<Node>& right) {
    if (!right) return std::nullopt;
    const int depth = std::max(left.depth, right->depth) + 1;
    if (depth > kMaxTreeDepth) return std::nullopt;
    auto value = apply(op, left.value, right->value);
    if (!value) return std::nullopt;
    return Node{std::move(*value), depth};
  }

  std::optional<Node> factor() {
    int signs = 0, minuses = 0;
    for (;; ++signs) {
      if (cursor_.take('-')) {
        ++minuses;
      } else if (!cursor_.take('+')) {
        break;
      }
    }
    if (signs == 0) return atom();
    open_signs_ += signs;
    const auto operand = within_levels() ? atom() : std::nullopt;
    open_signs_ -= signs;
    if (!operand || operand->depth + signs > kMaxTreeDepth) return std::nullopt;
    auto value = apply_sign(operand->value, minuses % 2 != 0);
    if (!value) return std::nullopt;
    return Node{std::move(*value), operand->depth + signs};
  }

  std::optional<Node> atom() {
    if (cursor_.take('(')) return group();
    if (cursor_.take("...")) return Node{Ellipsis{}};
    const std::string_view literal = cursor_.take_number();
    if (literal.empty()) return std::nullopt;
    auto value = parse_number(literal);
    if (!value) return std::nullopt;
    return Node{std::move(*value)};
  }

  /// What follows a "(". (After an operand a "(" would call it: nothing here can be called, and no rule takes it.)
  std::optional<Node> group() {
    ++open_parentheses_;
    std::optional<Node> inner;
    if (open_parentheses_ <= kMaxParentheses && within_levels()) {
      if (cursor_.take(')')) {
        inner = Node{EmptyTuple{}};
      } else if (inner = sum(); inner && !cursor_.take(')')) {
        inner.reset();
      }
    }
    --open_parentheses_;
    return inner;
  }

  bool within_levels() const { return open_parentheses_ * kLevelsPerParenthesis + open_signs_ <= kMaxLevels; }

  Cursor cursor_;
  int open_parentheses_ = 0;
  int open_signs_ = 0;  // signs whose operand is being read
};

}  // namespace

std::optional<std::string> evaluate_arithmetic(std::string_view expression) {
  return ArithmeticParser(expression).run();
}

}  // namespace nanochat_x::internal
