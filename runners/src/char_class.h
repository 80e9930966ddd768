#pragma once

#include <array>
#include <bitset>
#include <string>
#include <string_view>

namespace nanochat_x::internal {

/// What a split pattern can ask of a character.
enum class CharClass : unsigned char { other, letter, number, space };

/// The class that tiktoken gives a code point (\p{L}, \p{N}, \s).
CharClass class_of(char32_t code_point);

/// A set of shadow bytes.
using ByteSet = std::bitset<256>;

/// The shadow of a text has one byte for each of its characters, and a split pattern is matched against the shadow.
/// An ASCII character is its own shadow. A split pattern can tell other characters apart by their class alone (and,
/// where case is ignored, the two that fold to ASCII letters), so a few bytes stand for all of them.
struct Shadow {
  static constexpr unsigned char letter = 0x80, number = 0x81, space = 0x82, other = 0x83;
  static constexpr unsigned char long_s = 0x84;  ///< U+017F, a letter: "s" when case is ignored
  static constexpr unsigned char kelvin = 0x85;  ///< U+212A, a letter: "k" when case is ignored
};

/// The shadow of well-formed UTF-8. Throws Error with the offset of the first byte that is not.
std::string shadow_of(std::string_view text);

/// All shadow bytes of a class.
ByteSet shadows_of(CharClass wanted);

}  // namespace nanochat_x::internal
