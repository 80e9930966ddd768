#include "text.h"

#include <algorithm>

namespace nanochat_x::internal {

namespace {

void append_printable(std::string& out, std::string_view text, std::size_t limit) {
  static constexpr char kHex[] = "0123456789abcdef";
  const auto escape = [&out](unsigned char byte) {
    out += "\\x";
    out += kHex[byte >> 4];
    out += kHex[byte & 15];
  };
  unsigned char before = 0;
  std::size_t end = std::min(limit, text.size());
  while (end < text.size() && end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;  // whole ones
  for (const char c : text.substr(0, end)) {
    const auto byte = static_cast<unsigned char>(c);
    if (before == 0xc2 && byte >= 0x80 && byte < 0xa0) {  // U+0080 to U+009F: a terminal may obey these too
      out.pop_back();
      escape(before);
      escape(byte);
    } else if (byte < 0x20 || byte == 0x7f) {
      escape(byte);
    } else {
      out += c;
    }
    before = byte;
  }
  if (text.size() > limit) out += "...";
}

}  // namespace

std::string printable(std::string_view text) {
  std::string out;
  append_printable(out, text, 200);
  return out;
}

std::string without_controls(std::string_view text) {
  std::string out;
  append_printable(out, text, text.size());
  return out;
}

std::string in_quotes(std::string_view text) { return '"' + printable(text) + '"'; }

std::string display(const std::filesystem::path& path) {
  const std::u8string bytes = path.u8string();
  std::string out;
  append_printable(out, std::string(bytes.begin(), bytes.end()), 4096);
  return out;
}

std::filesystem::path path_from_utf8(std::string_view text) {
  return std::filesystem::path(std::u8string(text.begin(), text.end()));
}

}  // namespace nanochat_x::internal
