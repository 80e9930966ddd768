#include <doctest/doctest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "base64.h"
#include "error_of.h"
#include "nanochat_x/tokenizer.h"
#include "temp_dir.h"

using nanochat_x::TokenId;
using nanochat_x::Tokenizer;
using nanochat_x::internal::decode_base64;
using nanochat_x::test::contains;
using nanochat_x::test::error_of;
using Json = nlohmann::json;
using Ids = std::vector<TokenId>;

namespace {

std::string base64(std::string_view bytes) {
  static constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    unsigned bits = 0;
    for (std::size_t k = 0; k < 3; ++k) {
      bits = bits << 8 | (i + k < bytes.size() ? static_cast<unsigned char>(bytes[i + k]) : 0u);
    }
    for (std::size_t k = 0; k < 4; ++k) text += i + k > bytes.size() ? '=' : kDigits[bits >> (18 - 6 * k) & 63];
  }
  return text;
}

const std::vector<std::string> kSpecial = {
    "<|bos|>",          "<|user_start|>", "<|user_end|>",     "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"};

/// The 256 bytes, then these tokens with ids from 256 on, then nanochat's special tokens.
Json tokenizer_json(const std::vector<std::string>& merged = {"ab", "bc", "abc", "cd", "aa", "xyz"}) {
  Json tokens = Json::array();
  for (int byte = 0; byte < 256; ++byte) {
    tokens.push_back(base64(std::string(1, static_cast<char>(static_cast<unsigned char>(byte)))));
  }
  for (const auto& token : merged) tokens.push_back(base64(token));
  Json special = Json::object();
  for (const auto& name : kSpecial) special[name] = tokens.size() + special.size();
  return {{"version", 1}, {"pattern", R"(\p{L}+|\P{L})"}, {"tokens", tokens}, {"special_tokens", special}};
}

Tokenizer parse(const Json& json) { return Tokenizer::parse(json.dump(), "t.json"); }

/// The error of a tokenizer.json that `change` spoiled.
template <typename Change>
std::string error_after(Change change) {
  Json json = tokenizer_json();
  change(json);
  return error_of([&] { parse(json); });
}

}  // namespace

TEST_CASE("pieces are merged by rank, the lowest first and the leftmost of equals") {
  const Tokenizer tokenizer = parse(tokenizer_json());  // 256 ab, 257 bc, 258 abc, 259 cd, 260 aa, 261 xyz
  CHECK(tokenizer.encode("") == Ids{});
  CHECK(tokenizer.encode("abcd") == Ids{258, 'd'});
  CHECK(tokenizer.encode("bcd") == Ids{257, 'd'});
  CHECK(tokenizer.encode("aaa") == Ids{260, 'a'});
  CHECK(tokenizer.encode("aaab") == Ids{260, 256});
  CHECK(tokenizer.encode("xyz") == Ids{261});  // a whole piece is its own token even if no merges lead to it
  CHECK(tokenizer.encode("xyzx") == Ids{'x', 'y', 'z', 'x'});
  CHECK(tokenizer.encode("é") == Ids{0xC3, 0xA9});
  CHECK(tokenizer.encode("ab ab") == Ids{256, ' ', 256});
}

TEST_CASE("a long piece is merged like a short one, and fast") {
  const Tokenizer tokenizer = parse(tokenizer_json());
  const std::size_t n = 1'000'000;
  CHECK(tokenizer.encode(std::string(n, 'a')) == Ids(n / 2, 260));
  const Ids odd = tokenizer.encode(std::string(n + 1, 'a'));
  CHECK(odd.size() == n / 2 + 1);
  CHECK(odd.back() == 'a');
}

TEST_CASE("special tokens are ids of their own, and their names in a text are text") {
  const Tokenizer tokenizer = parse(tokenizer_json());
  CHECK(tokenizer.vocab_size() == 256 + 6 + 9);
  CHECK(tokenizer.special().bos == 262);
  CHECK(tokenizer.special().user_start == 263);
  CHECK(tokenizer.special().user_end == 264);
  CHECK(tokenizer.special().assistant_start == 265);
  CHECK(tokenizer.special().assistant_end == 266);
  CHECK(tokenizer.special().python_start == 267);
  CHECK(tokenizer.special().python_end == 268);
  CHECK(tokenizer.special().output_start == 269);
  CHECK(tokenizer.special().output_end == 270);
  CHECK(tokenizer.special_id("<|python_end|>") == 268);
  CHECK_FALSE(tokenizer.special_id("ab").has_value());
  CHECK(tokenizer.token_bytes(262) == "<|bos|>");
  const Ids bos = tokenizer.encode("<|bos|>");
  CHECK(bos == Ids{'<', '|', 'b', 'o', 's', '|', '>'});
}

TEST_CASE("decoding joins bytes first and replaces what is no UTF-8 then") {
  const Tokenizer tokenizer = parse(tokenizer_json());
  CHECK(tokenizer.decode(Ids{258, 0xC3, 0xA9, 262}) == "abcé<|bos|>");
  CHECK(tokenizer.decode(Ids{0xC3, 'x'}) == "\xEF\xBF\xBDx");
  CHECK(tokenizer.decode_bytes(Ids{0xC3, 'x'}) == "\xC3x");
  CHECK(contains(error_of([&] { tokenizer.token_bytes(271); }), "token id 271 is out of range"));
  CHECK(contains(error_of([&] { tokenizer.decode(Ids{-1}); }), "token id -1 is out of range"));
  CHECK(contains(error_of([&] { tokenizer.encode("ab\x80"); }), "not UTF-8"));
}

TEST_CASE("what each token counts in bits per byte") {
  Json json = tokenizer_json({"ab", "\xC3\xA9", "\xA9\xC3"});
  CHECK_FALSE(parse(json).counts_bytes());
  CHECK(contains(error_of([&] { parse(json).byte_count(0); }), "does not tell its tokens' bytes"));
  Json counts = Json::array();
  for (int byte = 0; byte < 256; ++byte) counts.push_back(byte < 0x80 ? 1 : 3);  // half a character is U+FFFD
  for (const int count : {2, 2, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0}) counts.push_back(count);
  json["token_bytes"] = counts;
  const Tokenizer tokenizer = parse(json);
  CHECK(tokenizer.counts_bytes());
  CHECK(tokenizer.byte_count('a') == 1);
  CHECK(tokenizer.byte_count(0xC3) == 3);
  CHECK(tokenizer.byte_count(257) == 2);
  CHECK(tokenizer.byte_count(258) == 6);
  CHECK(tokenizer.byte_count(tokenizer.special().bos) == 0);
  CHECK(contains(error_of([&] { tokenizer.byte_count(268); }), "token id 268 is out of range"));
  for (const int own : {0xC3, 258}) {  // its own bytes are taken too
    json["token_bytes"][static_cast<std::size_t>(own)] = tokenizer.token_bytes(own).size();
    CHECK(parse(json).byte_count(own) == std::ssize(tokenizer.token_bytes(own)));
  }
  const auto error_with = [&](const Json& value) {
    Json changed = json;
    changed["token_bytes"] = value;
    return error_of([&] { parse(changed); });
  };
  CHECK(contains(error_with(Json::array()), "token_bytes: has 0 numbers for 268 tokens"));
  CHECK(contains(error_with(1), "token_bytes: must be an array"));
  Json wrong = counts;
  wrong[256] = 3;
  CHECK(contains(error_with(wrong), "token_bytes: says 3 for token 256, which has 2"));
  wrong = counts;
  wrong[260] = 7;  // "<|user_start|>" is no text
  CHECK(contains(error_with(wrong), "token_bytes: says 7 for token 260, which has 0"));
  wrong[0] = "1";
  CHECK(contains(error_with(wrong), "token_bytes: must hold integers alone"));
}

TEST_CASE("a tokenizer can be moved") {
  Tokenizer first = parse(tokenizer_json());
  const Tokenizer second = std::move(first);
  CHECK(second.encode("abc") == Ids{258});
}

TEST_CASE("malformed tokenizer files are refused, each with its reason") {
  CHECK(parse(tokenizer_json()).vocab_size() == 271);  // what the changes below spoil
  CHECK(contains(error_after([](Json& j) { j["version"] = 2; }), "t.json: version: is 2, this program reads 1"));
  CHECK(contains(error_after([](Json& j) { j["version"] = "1"; }), "version: must be an integer"));
  CHECK(contains(error_after([](Json& j) { j.erase("version"); }), "version: is missing"));
  CHECK(contains(error_after([](Json& j) { j.erase("pattern"); }), "pattern: is missing"));
  CHECK(contains(error_after([](Json& j) { j["pattern"] = 3; }), "pattern: must be a string"));
  CHECK(contains(error_after([](Json& j) { j["pattern"] = "a*"; }), "t.json: the split pattern is not supported"));
  CHECK(contains(error_after([](Json& j) { j["tokens"] = Json::object(); }), "tokens: must be an array"));
  CHECK(contains(error_after([](Json& j) { j["tokens"][7] = 7; }), "tokens: must hold strings"));
  CHECK(contains(error_after([](Json& j) { j["tokens"][7] = "Bw="; }), "token 7 is not base64"));
  CHECK(contains(error_after([](Json& j) { j["tokens"][7] = ""; }), "token 7 is empty"));
  CHECK(contains(error_after([](Json& j) { j["tokens"][256] = "YmM="; }), "tokens 256 and 257 have the same bytes"));
  CHECK(contains(error_after([](Json& j) { j["tokens"][7] = "Bwc="; }), "no token for the single byte 7"));
  CHECK(contains(error_after([](Json& j) { j["tokens"].erase(261); }), "expected 261, found 262"));
  CHECK(
      contains(error_after([](Json& j) { j["special_tokens"] = Json::array(); }), "special_tokens: must be an object"));
  CHECK(contains(error_after([](Json& j) { j["special_tokens"]["<|bos|>"] = 263; }), "expected 262, found 263"));
  CHECK(contains(error_after([](Json& j) { j["special_tokens"]["<|bos|>"] = -1; }), "<|bos|>: is -1"));
  CHECK(contains(error_after([](Json& j) { j["special_tokens"]["<|bos|>"] = 1.5; }), "<|bos|>: must be an integer"));
  CHECK(contains(error_after([](Json& j) { j["special_tokens"]["more"] = 272; }), "expected 271, found 272"));
  CHECK(contains(error_after([](Json& j) {
                   j["special_tokens"].erase("<|output_end|>");
                   j["special_tokens"]["else"] = 270;
                 }),
                 "the special token <|output_end|> is missing"));
}

TEST_CASE("text that is not even a JSON object is refused") {
  const auto error = [](const std::string& text) { return error_of([&] { Tokenizer::parse(text, "t.json"); }); };
  CHECK(contains(error(""), "t.json: is not valid JSON"));
  CHECK(contains(error("[1]"), "t.json: must be an object"));
  CHECK(contains(error("{\"version\": 1"), "is not valid JSON"));
  CHECK(contains(error(std::string(1'000'000, '[')), "nests deeper"));
  CHECK(contains(error("{\"version\": 1, \"version\": 1}"), "twice"));
  CHECK(contains(error("{\"version\": \"\xFF\"}"), "is not valid JSON"));
}

TEST_CASE("a tokenizer is read from a file") {
  const nanochat_x::test::TempDir folder;
  nanochat_x::test::write_file(folder / "tokenizer.json", tokenizer_json().dump());
  CHECK(Tokenizer::load(folder / "tokenizer.json").encode("abc") == Ids{258});
  CHECK(contains(error_of([&] { Tokenizer::load(folder / "none.json"); }), "none.json: cannot be read"));
  CHECK(contains(error_of([&] { Tokenizer::load(folder.path()); }), "cannot be read"));
}

TEST_CASE("base64 is read strictly") {
  CHECK(decode_base64("") == "");
  CHECK(decode_base64("TWFu") == "Man");
  CHECK(decode_base64("TWE=") == "Ma");
  CHECK(decode_base64("TQ==") == "M");
  CHECK(decode_base64("+/+/") == "\xFB\xFF\xBF");
  for (const char* text : {"TQ", "TQ=", "T===", "TQ==TQ==", "TR==", "T W=", "TW\n=", "====", "TQ=A", "_-_-", "A"}) {
    CAPTURE(text);
    CHECK_FALSE(decode_base64(text).has_value());
  }
}
