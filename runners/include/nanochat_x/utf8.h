#pragma once

#include <string>
#include <string_view>

namespace nanochat_x {

/// True if `bytes` is well-formed UTF-8 (no surrogates, no overlong forms, nothing above U+10FFFF).
bool is_valid_utf8(std::string_view bytes);

/// `bytes` with every maximal ill-formed part replaced by U+FFFD: what Python's
/// `bytes.decode("utf-8", errors="replace")` gives (Unicode 15, section 3.9, "substitution of maximal subparts").
std::string replace_invalid_utf8(std::string_view bytes);

/// Turns a stream of bytes that may be cut anywhere into a stream of whole characters.
/// The concatenation of all `push` results and of `finish` equals `replace_invalid_utf8` of all the bytes.
class Utf8Stream {
 public:
  /// Takes more bytes, returns the characters that are complete by now.
  std::string push(std::string_view bytes);
  /// Ends the stream: a character that stayed incomplete becomes U+FFFD. The object can be used again.
  std::string finish();

 private:
  std::string pending_;  // at most 3 bytes: the start of a character that may yet become whole
};

}  // namespace nanochat_x
