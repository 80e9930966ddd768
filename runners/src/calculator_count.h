#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace nanochat_x::internal {

/// `str` of the value of an expression of string literals, parentheses and `TEXT.count(TEXT)`; nothing for any other.
///
/// More would have a value in Python (names of methods, comparisons, bytes): nothing but `str.count` is ever evaluated.
std::optional<std::string> evaluate_count(std::string_view expression);

}  // namespace nanochat_x::internal
