#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace nanochat_x {

/// nanochat's calculator tool: `str(result)` of a Python expression, or nothing where nanochat gives None.
/// Arithmetic with Python's exact results (integers of any size, float `repr`), and `str.count` on string literals;
/// nothing else is ever evaluated. Never throws for any input; takes bounded time and memory.
std::optional<std::string> calculate(std::string_view expression);

}  // namespace nanochat_x
