#pragma once

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "demand.h"
#include "nanochat_x/calculator.h"
#include "nanochat_x/tokenizer.h"
#include "nanochat_x/utf8.h"
#include "splitter.h"

// What the text side promises of any input: splitter, tokenizer's file, UTF-8, calculator.

namespace nanochat_x::fuzz {

/// A line with a split pattern, then a text: pieces are views of the text, in order, none empty, none over another.
template <typename MakeSplitter>
void check_splitter(std::string_view input, const MakeSplitter& make) {
  const std::string_view pattern = input.substr(0, input.find('\n'));
  const std::string_view text = input.substr(std::min(input.size(), pattern.size() + 1));
  std::optional<decltype(make(pattern))> splitter;
  if (refusal([&] { splitter.emplace(make(pattern)); })) return;
  std::vector<std::string_view> pieces;
  const auto refused = refusal([&] { pieces = (*splitter)->split(text); });
  demand(is_valid_utf8(text) || refused, "a text that is not UTF-8 is refused");
  std::size_t end = 0;
  for (const std::string_view piece : pieces) {
    demand(piece.data() >= text.data() && piece.data() + piece.size() <= text.data() + text.size(),
           "a piece is a part of the text");
    const auto begin = static_cast<std::size_t>(piece.data() - text.data());
    demand(!piece.empty() && begin >= end, "pieces follow each other");
    demand(is_valid_utf8(piece), "a piece is made of whole characters");
    end = begin + piece.size();
  }
}

inline void check_splitter(std::string_view input) {
  check_splitter(input, [](std::string_view pattern) { return std::make_unique<internal::Splitter>(pattern); });
}

/// True if `part` is left of `whole` when some bytes are taken out.
inline bool is_subsequence(std::string_view part, std::string_view whole) {
  auto at = whole.begin();
  for (const char c : part) {
    at = std::find(at, whole.end(), c);
    if (at == whole.end()) return false;
    ++at;
  }
  return true;
}

/// A tokenizer.json, or (behind a 'P') a pattern and, after a zero byte each, further tokens: with the single bytes and
/// the special tokens they make one, which no random change of its text would.
inline std::string tokenizer_text(std::string_view input) {
  if (!input.starts_with('P')) return std::string(input);
  input.remove_prefix(1);
  static constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const auto base64 = [](std::string_view bytes) {
    std::string text;
    std::uint32_t bits = 0;
    int held = 0;
    for (const char c : bytes) {
      bits = bits << 8U | static_cast<unsigned char>(c);
      for (held += 8; held >= 6; held -= 6) text += kDigits[bits >> (held - 6) & 63U];
    }
    if (held > 0) text += kDigits[bits << (6 - held) & 63U];
    text.append((4 - text.size() % 4) % 4, '=');
    return text;
  };
  nlohmann::json tokens = nlohmann::json::array(), special;
  for (int byte = 0; byte < 256; ++byte) tokens.push_back(base64(std::string(1, static_cast<char>(byte))));
  std::vector<std::string_view> parts;
  for (std::size_t begin = 0; begin <= input.size();) {
    const std::size_t end = std::min(input.find('\0', begin), input.size());
    parts.push_back(input.substr(begin, end - begin));
    begin = end + 1;
  }
  for (std::size_t i = 1; i < parts.size(); ++i) tokens.push_back(base64(parts[i]));
  auto id = tokens.size();
  for (const char* name : {"<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
                           "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"}) {
    special[name] = id++;
  }
  const nlohmann::json file = {{"version", 1}, {"pattern", parts[0]}, {"tokens", tokens}, {"special_tokens", special}};
  return file.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

/// tokenizer.json: refused in one line, or a tokenizer whose ids are in range and give back the text, or what its
/// pattern takes of it.
template <typename Encode>
void check_tokenizer_file(std::string_view input, const Encode& encode) {
  const std::string json = tokenizer_text(input);
  std::optional<Tokenizer> tokenizer;
  const auto refused = refusal([&] { tokenizer.emplace(Tokenizer::parse(json, "tokenizer.json")); });
  if (refused) {
    demand(refused->starts_with("tokenizer.json"), "an error names the file");
    return;
  }
  const std::int64_t size = tokenizer->vocab_size();
  demand(size >= 256 + 9, "there is a token for each byte, and nanochat's nine");
  for (const TokenId outside : {std::int64_t{-1}, size}) {
    demand(refusal([&] { (void)tokenizer->token_bytes(outside); }).has_value(), "an id out of range is refused");
  }
  for (TokenId id = 0; id < size; ++id) demand(!tokenizer->token_bytes(id).empty(), "a token has bytes");
  const std::string text = replace_invalid_utf8(input.substr(0, 500)) + " Don't  stop,\n\n 12345 caf\u00e9 \U0001f600";
  std::vector<TokenId> ids;
  if (refusal([&] { ids = encode(*tokenizer, text); })) return;
  for (const TokenId id : ids) demand(id >= 0 && id < size, "an id is in the vocabulary");
  demand(is_subsequence(tokenizer->decode_bytes(ids), text), "ids give back what the pattern takes of a text");
}

inline void check_tokenizer_file(std::string_view input) {
  check_tokenizer_file(input, [](const Tokenizer& tokenizer, std::string_view text) { return tokenizer.encode(text); });
}

/// Cuts the bytes into pieces (the first byte tells how): the stream gives what the whole gives, and only whole
/// characters on the way.
template <typename Stream>
void check_utf8_with(std::string_view input) {
  if (input.empty()) return;
  auto cuts = static_cast<unsigned char>(input.front());
  const std::string_view bytes = input.substr(1);
  const std::string whole = replace_invalid_utf8(bytes);
  demand(is_valid_utf8(whole), "what was replaced is UTF-8");
  demand(is_valid_utf8(bytes) == (whole == bytes), "UTF-8, and nothing else, needs no replacement");
  Stream stream;
  std::string streamed;
  for (std::size_t begin = 0; begin < bytes.size();) {
    const std::size_t length = 1 + cuts % 5;
    cuts = static_cast<unsigned char>(cuts * 5 + 3);
    const std::string pushed = stream.push(bytes.substr(begin, length));
    demand(is_valid_utf8(pushed), "a piece is made of whole characters");
    streamed += pushed;
    begin += length;
  }
  demand(streamed + stream.finish() == whole, "the stream gives what the whole gives");
}

inline void check_utf8(std::string_view input) { check_utf8_with<Utf8Stream>(input); }

/// The calculator throws nothing, answers in plain ASCII, takes no heed of commas, and a number is its own value.
template <typename Calculate>
void check_calculator(std::string_view expression, const Calculate& calculate) {
  std::optional<std::string> result;
  demand(!refusal([&] { result = calculate(expression); }), "the calculator never throws");
  demand(calculate("," + std::string(expression)) == result, "commas do not matter");
  if (!result) return;
  demand(std::ranges::all_of(*result, [](char c) { return c >= 0x20 && c < 0x7f; }), "a result is plain ASCII");
  const bool is_number = !result->empty() && result->find_first_not_of("0123456789.-") == std::string::npos &&
                         result->find_first_of("0123456789") != std::string::npos;
  if (is_number) demand(calculate(*result) == result, "a number is its own value");
}

inline void check_calculator(std::string_view expression) {
  check_calculator(expression, [](std::string_view text) { return calculate(text); });
}

}  // namespace nanochat_x::fuzz
