#include <doctest/doctest.h>

#include <string>
#include <string_view>
#include <vector>

#include "error_of.h"
#include "split_pattern.h"
#include "splitter.h"

using nanochat_x::internal::Splitter;
using nanochat_x::internal::translate_split_pattern;
using nanochat_x::test::contains;
using nanochat_x::test::error_of;

namespace {

using Pieces = std::vector<std::string>;

constexpr std::string_view kNanochat =
    R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+)";

Pieces split(std::string_view text, std::string_view pattern = kNanochat) {
  const Splitter splitter(pattern);
  Pieces pieces;
  for (const std::string_view piece : splitter.split(text)) pieces.emplace_back(piece);
  return pieces;
}

}  // namespace

TEST_CASE("nanochat's pattern, branch by branch") {
  CHECK(split("").empty());
  CHECK(split("Hello, world") == Pieces{"Hello", ",", " world"});
  CHECK(split("don't we'LL") == Pieces{"don", "'t", " we", "'LL"});
  CHECK(split("12345") == Pieces{"12", "34", "5"});
  CHECK(split("x  y   ") == Pieces{"x", " ", " y", "   "});
  CHECK(split("a\n\n  b") == Pieces{"a", "\n\n", " ", " b"});
  CHECK(split("a!?\r\nb") == Pieces{"a", "!?\r\n", "b"});
  CHECK(split("\tx (y)") == Pieces{"\tx", " (", "y", ")"});
}

TEST_CASE("other patterns that nanochat has had or may have") {
  CHECK(split("12345", R"(\p{N}{1,3})") == Pieces{"123", "45"});
  CHECK(split("a \n", R"(\s++$|\S)") == Pieces{"a", " \n"});
  CHECK(split("ab1", R"(\P{L}|\p{L}+?)") == Pieces{"a", "b", "1"});
  CHECK(split("a-]z", R"([a-cx\-\]]+|.)") == Pieces{"a-]", "z"});
}

TEST_CASE("classes are tiktoken's, not those of the PCRE2 at hand") {
  CHECK(split("é中٣²") == Pieces{"é中", "٣²"});
  CHECK(split("it'ſ") == Pieces{"it", "'ſ"});        // U+017F is an s when case is ignored
  CHECK(split("a\u180E") == Pieces{"a", "\u180E"});  // no space since Unicode 6.3
  CHECK(split("\u0085\u3000x") == Pieces{"\u0085", "\u3000x"});
  CHECK(split("\U00010D4A"
              "b") == Pieces{"\U00010D4A"
                             "b"});              // a letter since Unicode 16
  CHECK(split("\u0301a") == Pieces{"\u0301a"});  // a mark is no letter: it is what may stand before letters
}

TEST_CASE("text that the pattern does not match is dropped, as tiktoken does") {
  CHECK(split("a1b", R"(\p{L})") == Pieces{"a", "b"});
}

TEST_CASE("text that is not UTF-8 is refused with its place") {
  CHECK(contains(error_of([] { split("é\xFFz"); }), "byte 0xFF at offset 2"));
  CHECK(contains(error_of([] { split("abc\xE2\x82"); }), "byte 0xE2 at offset 3"));
}

TEST_CASE("a pattern that is malformed or not known to be read alike is refused") {
  const std::vector<std::string> refused = {
      "",         "a*",      "a|",     "(?:)",   "[[:alpha:]]", R"(\p{Lu})", "(?<=a)b", "(?i)a",
      "a{2}{3}",  "a**",     "*a",     "(a",     "a)",          "é",         R"(\d)",   R"(\b)",
      "[z-a]",    "[a&&b]",  "[a--b]", "[",      "[a",          "[]a]",      "[a-\\s]", "\\",
      "x{3,1}",   "x{1000}", "x{,2}",  "(?=a)+", "(?i:é)",      "\\x41",     "^+a",     R"((?i:\p{L}))",
      R"((a)\1)", "a{2",     "[a-",    "(?"};
  for (const auto& pattern : refused) {
    CAPTURE(pattern);
    CHECK(contains(error_of([&] { Splitter{pattern}; }), "the split pattern is "));
  }
  CHECK(contains(error_of([] { Splitter{std::string(20'000, 'a')}; }), "longer than"));
  CHECK(contains(error_of([] { Splitter{std::string(200, '(') + "a" + std::string(200, ')')}; }), "nested too deep"));
  CHECK(contains(error_of([] { translate_split_pattern(R"(ab\d)"); }), "at offset 2"));
}

TEST_CASE("long texts need neither much stack nor much time") {
  const std::size_t n = 1'000'000;
  CHECK(split(std::string(n, 'a')).size() == 1);
  CHECK(split(std::string(n, ' ')).size() == 1);
  CHECK(split(std::string(n, '\n')).size() == 1);
  CHECK(split(std::string(n, ' ') + "x").back() == " x");
  CHECK(split(std::string(n, '7')).size() == n / 2);
}

TEST_CASE("a pattern that backtracks without end is stopped") {
  CHECK(contains(error_of([] { split(std::string(64, 'a') + "d", "(?:a+)+[bc]"); }), "cannot be split"));
}
