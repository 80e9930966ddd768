#include "char_class.h"

#include <algorithm>
#include <cstdio>
#include <iterator>

#include "nanochat_x/error.h"
#include "utf8_scan.h"

namespace nanochat_x::internal {
namespace {

struct ClassRange {
  char32_t first, last;
  CharClass kind;
};

constexpr ClassRange kRanges[] = {
#include "unicode_tables.inc"
};

unsigned char shadow_byte(char32_t code_point) {
  if (code_point < 0x80) return static_cast<unsigned char>(code_point);
  if (code_point == 0x017F) return Shadow::long_s;
  if (code_point == 0x212A) return Shadow::kelvin;
  switch (class_of(code_point)) {
    case CharClass::letter:
      return Shadow::letter;
    case CharClass::number:
      return Shadow::number;
    case CharClass::space:
      return Shadow::space;
    case CharClass::other:
      break;
  }
  return Shadow::other;
}

[[noreturn]] void throw_not_utf8(std::string_view text, std::size_t position) {
  char byte[5];
  std::snprintf(byte, sizeof byte, "0x%02X", static_cast<unsigned>(static_cast<unsigned char>(text[position])));
  throw Error("the text is not UTF-8: an ill-formed character begins with byte " + std::string(byte) + " at offset " +
              std::to_string(position));
}

}  // namespace

CharClass class_of(char32_t code_point) {
  const auto* range = std::upper_bound(std::begin(kRanges), std::end(kRanges), code_point,
                                       [](char32_t c, const ClassRange& r) { return c < r.first; });
  if (range == std::begin(kRanges) || code_point > std::prev(range)->last) return CharClass::other;
  return std::prev(range)->kind;
}

std::string shadow_of(std::string_view text) {
  std::string shadow;
  shadow.reserve(text.size());
  for (std::size_t position = 0; position < text.size();) {
    const Utf8Scan scan = scan_utf8(text, position);
    if (scan.kind != Utf8Scan::Kind::character) throw_not_utf8(text, position);
    shadow.push_back(static_cast<char>(shadow_byte(scan.code_point)));
    position += scan.length;
  }
  return shadow;
}

ByteSet shadows_of(CharClass wanted) {
  ByteSet set;
  for (unsigned char c = 0; c < 0x80; ++c) set[c] = class_of(c) == wanted;
  set[Shadow::letter] = set[Shadow::long_s] = set[Shadow::kelvin] = wanted == CharClass::letter;
  set[Shadow::number] = wanted == CharClass::number;
  set[Shadow::space] = wanted == CharClass::space;
  set[Shadow::other] = wanted == CharClass::other;
  return set;
}

}  // namespace nanochat_x::internal
