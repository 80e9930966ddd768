#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace nanochat_x::internal {

/// `str` of the value that Python gives an expression of the characters `0123456789*+-/.() ` without `**`; nothing
/// where Python raises.
std::optional<std::string> evaluate_arithmetic(std::string_view expression);

}  // namespace nanochat_x::internal
