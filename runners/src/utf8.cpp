#include "nanochat_x/utf8.h"

#include "utf8_scan.h"

namespace nanochat_x {
namespace {

using internal::scan_utf8;
using internal::Utf8Scan;

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

/// Appends the characters of `bytes`, U+FFFD for each ill-formed part. Stops at an incomplete end and returns where it
/// begins (the size if there is none).
std::size_t append_repaired(std::string_view bytes, std::string& out) {
  std::size_t position = 0;
  while (position < bytes.size()) {
    const Utf8Scan scan = scan_utf8(bytes, position);
    if (scan.kind == Utf8Scan::Kind::incomplete) return position;
    out += scan.kind == Utf8Scan::Kind::character ? bytes.substr(position, scan.length) : kReplacement;
    position += scan.length;
  }
  return position;
}

}  // namespace

bool is_valid_utf8(std::string_view bytes) {
  for (std::size_t position = 0; position < bytes.size();) {
    const Utf8Scan scan = scan_utf8(bytes, position);
    if (scan.kind != Utf8Scan::Kind::character) return false;
    position += scan.length;
  }
  return true;
}

std::string replace_invalid_utf8(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  if (append_repaired(bytes, out) != bytes.size()) out += kReplacement;
  return out;
}

std::string Utf8Stream::push(std::string_view bytes) {
  pending_ += bytes;
  std::string out;
  const std::size_t end = append_repaired(pending_, out);
  pending_.erase(0, end);
  return out;
}

std::string Utf8Stream::finish() {
  const bool cut = !pending_.empty();
  pending_.clear();
  return cut ? std::string(kReplacement) : std::string();
}

}  // namespace nanochat_x
