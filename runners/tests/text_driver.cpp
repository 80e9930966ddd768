// Text functions of the core library behind JSON lines, for the differential tests (tests/test_text_parity.py): one
// request a line on stdin, one answer a line on stdout, {"error": ...} where the library throws.
//
//   {"op": "tokenizer", "json": TEXT} or {"op": "tokenizer", "path": FILE}    -> {"vocab_size", "special"}
//   {"op": "encode", "text": TEXT} or {"op": "encode", "hex": BYTES}          -> {"ids"}
//   {"op": "decode", "ids": [...]}                                            -> {"text", "hex"}
//   {"op": "calculate", "expression": TEXT}                                   -> {"result": TEXT or null}
//   {"op": "utf8", "chunks": [BYTES, ...]}                    -> {"pushed": [...], "end", "whole", "valid"}
//   {"op": "utf8_splits", "hex": BYTES}                       -> {"splits": how many ways to cut the bytes were tried,
//                                                                 "outcomes": the different texts that the stream gave}

#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "json_lines.h"
#include "nanochat_x/calculator.h"
#include "nanochat_x/error.h"
#include "nanochat_x/tokenizer.h"
#include "nanochat_x/utf8.h"

namespace {

using nanochat_x::Tokenizer;
using Json = nlohmann::json;

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes.push_back(static_cast<char>(static_cast<unsigned char>(std::stoi(hex.substr(i, 2), nullptr, 16))));
  }
  return bytes;
}

std::string to_hex(const std::string& bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    hex += kDigits[byte >> 4];
    hex += kDigits[byte & 15];
  }
  return hex;
}

class Driver {
 public:
  Json answer(const Json& request) {
    const std::string op = request.at("op");
    if (op == "tokenizer") return open(request);
    if (op == "encode") {
      return {{"ids", tokenizer().encode(request.contains("hex") ? from_hex(request.at("hex"))
                                                                 : request.at("text").get<std::string>())}};
    }
    if (op == "decode") {
      const std::vector<nanochat_x::TokenId> ids = request.at("ids");
      return {{"text", tokenizer().decode(ids)}, {"hex", to_hex(tokenizer().decode_bytes(ids))}};
    }
    if (op == "calculate") {
      const auto result = nanochat_x::calculate(request.at("expression").get<std::string>());
      return {{"result", result ? Json(*result) : Json()}};
    }
    if (op == "utf8") return utf8(request.at("chunks"));
    if (op == "utf8_splits") return utf8_splits(from_hex(request.at("hex")));
    throw std::invalid_argument("unknown op " + op);
  }

 private:
  Json open(const Json& request) {
    tokenizer_ = request.contains("path") ? Tokenizer::load(request.at("path").get<std::string>())
                                          : Tokenizer::parse(request.at("json").get<std::string>(), "tokenizer.json");
    const auto& special = tokenizer_->special();
    return {{"vocab_size", tokenizer_->vocab_size()},
            {"special",
             {special.bos, special.user_start, special.user_end, special.assistant_start, special.assistant_end,
              special.python_start, special.python_end, special.output_start, special.output_end}}};
  }

  static Json utf8(const Json& chunks) {
    nanochat_x::Utf8Stream stream;
    std::string all;
    Json pushed = Json::array();
    for (const auto& chunk : chunks) {
      const std::string bytes = from_hex(chunk);
      all += bytes;
      pushed.push_back(stream.push(bytes));
    }
    return {{"pushed", std::move(pushed)},
            {"end", stream.finish()},
            {"whole", nanochat_x::replace_invalid_utf8(all)},
            {"valid", nanochat_x::is_valid_utf8(all)}};
  }

  // The stream's text when `bytes` are cut where `cut` has a true (before the byte of that index).
  static std::string streamed(std::string_view bytes, const std::vector<bool>& cut) {
    nanochat_x::Utf8Stream stream;
    std::string text;
    std::size_t begin = 0;
    for (std::size_t i = 1; i < bytes.size(); ++i) {
      if (!cut[i]) continue;
      text += stream.push(bytes.substr(begin, i - begin));
      begin = i;
    }
    text += stream.push(bytes.substr(begin));
    return text + stream.finish();
  }

  static Json utf8_splits(const std::string& bytes) {
    std::set<std::string> outcomes;
    std::vector<bool> cut(bytes.size());
    std::size_t splits = 0;
    const auto attempt = [&] {
      outcomes.insert(streamed(bytes, cut));
      ++splits;
    };
    if (bytes.size() > 10) {
      attempt();
      for (std::size_t i = 1; i < bytes.size(); ++i) {
        cut.assign(bytes.size(), false);
        cut[i] = true;
        attempt();
      }
      cut.assign(bytes.size(), true);
      attempt();
    } else {
      for (unsigned chosen = 0; chosen < 1U << (bytes.empty() ? 0 : bytes.size() - 1); ++chosen) {
        for (std::size_t i = 1; i < bytes.size(); ++i) cut[i] = (chosen >> (i - 1) & 1U) != 0;
        attempt();
      }
    }
    return {{"splits", splits}, {"outcomes", outcomes}};
  }

  const Tokenizer& tokenizer() const {
    if (!tokenizer_) throw std::invalid_argument("no tokenizer yet");
    return *tokenizer_;
  }

  std::optional<Tokenizer> tokenizer_;
};

}  // namespace

int main() {
  return serve_json_lines("text_driver", [] { return Driver(); });
}
