#include "text.h"

namespace nanochat_x::internal {

namespace {

void append_printable(std::string& out, std::string_view text, std::size_t limit) {
  constexpr char kHex[] = "0123456789abcdef";
  for (const char c : text.substr(0, limit)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      out += "\\x";
      out += kHex[byte >> 4];
      out += kHex[byte & 15];
    } else {
      out += c;
    }
  }
  if (text.size() > limit) out += "...";
}

}  // namespace

std::string printable(std::string_view text) {
  std::string out;
  append_printable(out, text, 200);
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
