#include "utf8_scan.h"

namespace nanochat_x::internal {
namespace {

/// What a lead byte promises: how many bytes follow, and what the first of them may be. (Overlong forms, surrogates and
/// code points above U+10FFFF show in the second byte.)
struct Lead {
  std::size_t following = 0;
  unsigned char second_min = 0x80, second_max = 0xBF;
  unsigned char payload = 0;
  bool valid = true;
};

Lead lead_of(unsigned char byte) {
  if (byte < 0x80) return {0, 0x80, 0xBF, byte};
  if (byte < 0xC2 || byte > 0xF4) return {.valid = false};
  if (byte < 0xE0) return {1, 0x80, 0xBF, static_cast<unsigned char>(byte & 0x1F)};
  if (byte < 0xF0) {
    const auto min = static_cast<unsigned char>(byte == 0xE0 ? 0xA0 : 0x80);
    const auto max = static_cast<unsigned char>(byte == 0xED ? 0x9F : 0xBF);
    return {2, min, max, static_cast<unsigned char>(byte & 0x0F)};
  }
  const auto min = static_cast<unsigned char>(byte == 0xF0 ? 0x90 : 0x80);
  const auto max = static_cast<unsigned char>(byte == 0xF4 ? 0x8F : 0xBF);
  return {3, min, max, static_cast<unsigned char>(byte & 0x07)};
}

}  // namespace

Utf8Scan scan_utf8(std::string_view bytes, std::size_t position) {
  const Lead lead = lead_of(static_cast<unsigned char>(bytes[position]));
  if (!lead.valid) return {Utf8Scan::Kind::ill_formed, 1, 0};
  char32_t code_point = lead.payload;
  for (std::size_t i = 1; i <= lead.following; ++i) {
    if (position + i == bytes.size()) return {Utf8Scan::Kind::incomplete, i, 0};
    const auto byte = static_cast<unsigned char>(bytes[position + i]);
    const unsigned char min = i == 1 ? lead.second_min : 0x80;
    const unsigned char max = i == 1 ? lead.second_max : 0xBF;
    if (byte < min || byte > max) return {Utf8Scan::Kind::ill_formed, i, 0};
    code_point = code_point << 6 | (byte & 0x3F);
  }
  return {Utf8Scan::Kind::character, lead.following + 1, code_point};
}

}  // namespace nanochat_x::internal
