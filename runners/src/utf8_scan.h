#pragma once

#include <cstddef>
#include <string_view>

namespace nanochat_x::internal {

/// What stands at one place of a string that should be UTF-8.
struct Utf8Scan {
  enum class Kind {
    character,   ///< a well-formed character
    ill_formed,  ///< a maximal ill-formed part: one U+FFFD stands for all of it
    incomplete   ///< the string ends inside what may be the start of a character
  };
  Kind kind;
  std::size_t length;   ///< bytes, at least 1
  char32_t code_point;  ///< of a character; 0 otherwise
};

/// Looks at `bytes` from `position` (which must be before its end).
Utf8Scan scan_utf8(std::string_view bytes, std::size_t position);

}  // namespace nanochat_x::internal
