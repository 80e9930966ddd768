#include <doctest/doctest.h>

#include <string>
#include <string_view>
#include <vector>

#include "nanochat_x/utf8.h"

using nanochat_x::is_valid_utf8;
using nanochat_x::replace_invalid_utf8;
using nanochat_x::Utf8Stream;
using namespace std::string_literals;

namespace {

const std::string kR = "\xEF\xBF\xBD";  // U+FFFD

/// What a stream gives for these chunks: each push, then finish.
std::vector<std::string> stream(const std::vector<std::string>& chunks) {
  Utf8Stream utf8;
  std::vector<std::string> out;
  for (const auto& chunk : chunks) out.push_back(utf8.push(chunk));
  out.push_back(utf8.finish());
  return out;
}

}  // namespace

TEST_CASE("valid UTF-8 is told from the rest") {
  for (const std::string& text : {""s, "a\0b"s, "\x7F"s, "é"s, "\u0800"s, "\uD7FF"s, "\uE000"s, "\uFFFF"s,
                                  "\xF0\x90\x80\x80"s, "\xF4\x8F\xBF\xBF"s}) {
    CAPTURE(text);
    CHECK(is_valid_utf8(text));
    CHECK(replace_invalid_utf8(text) == text);
  }
  for (const std::string& text :
       {"\x80"s, "\xC0\x80"s, "\xC1\xBF"s, "\xC3"s, "\xE0\x9F\xBF"s, "\xED\xA0\x80"s, "\xF0\x8F\xBF\xBF"s,
        "\xF4\x90\x80\x80"s, "\xF5\x80\x80\x80"s, "\xFF"s, "\xE2\x82"s}) {
    CAPTURE(text);
    CHECK_FALSE(is_valid_utf8(text));
  }
}

// Right-hand sides are bytes.decode("utf-8", errors="replace") of the left, worked out with the rule of maximal
// subparts: one U+FFFD for the longest start of a character, one for each byte that starts none.
TEST_CASE("every maximal ill-formed part becomes one U+FFFD") {
  CHECK(replace_invalid_utf8("a\x80z") == "a" + kR + "z");
  CHECK(replace_invalid_utf8("\xC3(") == kR + "(");
  CHECK(replace_invalid_utf8("\xE2\x82") == kR);
  CHECK(replace_invalid_utf8("\xE2\x82x") == kR + "x");
  CHECK(replace_invalid_utf8("\xF0\x9F\x98") == kR);
  CHECK(replace_invalid_utf8("\xF0\x9F\x98\xF0\x9F\x98\x80") == kR + "😀");
  CHECK(replace_invalid_utf8("\xC0\x80") == kR + kR);                    // overlong
  CHECK(replace_invalid_utf8("\xE0\x80\x80") == kR + kR + kR);           // overlong
  CHECK(replace_invalid_utf8("\xED\xA0\x80") == kR + kR + kR);           // a surrogate
  CHECK(replace_invalid_utf8("\xF4\x90\x80\x80") == kR + kR + kR + kR);  // above U+10FFFF
  CHECK(replace_invalid_utf8("\xF5\xFF") == kR + kR);
}

TEST_CASE("a stream gives a character as soon as it is whole, and never half of one") {
  CHECK(stream({"\xE2", "\x82", "\xAC", "x"}) == std::vector<std::string>{"", "", "€", "x", ""});
  CHECK(stream({"a\xF0\x9F",
                "\x98\x80"
                "b"}) == std::vector<std::string>{"a", "😀b", ""});
  CHECK(stream({"", "é", ""}) == std::vector<std::string>{"", "é", "", ""});
}

TEST_CASE("a stream replaces what can no longer become a character at once, and the rest at its end") {
  CHECK(stream({"\xE2\x82", "z"}) == std::vector<std::string>{"", kR + "z", ""});
  CHECK(stream({"\xE0", "\x80"}) == std::vector<std::string>{"", kR + kR, ""});
  CHECK(stream({"\xFF"}) == std::vector<std::string>{kR, ""});
  CHECK(stream({"ok\xF0\x9F\x98"}) == std::vector<std::string>{"ok", kR});
}

TEST_CASE("a stream can be used again after finish") {
  Utf8Stream utf8;
  CHECK(utf8.push("\xC3") == "");
  CHECK(utf8.finish() == kR);
  CHECK(utf8.push("\xA9") == kR);  // not the end of the character that was cut
  CHECK(utf8.finish() == "");
}
