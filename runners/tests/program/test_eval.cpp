#include <doctest/doctest.h>

#include <cmath>
#include <numbers>

#include "program.h"

using namespace nanochat_x::test;
using nlohmann::json;

namespace {

// A fake bundle whose tokenizer tells its tokens' bytes: one each.
class EvalBundle : public FakeBundle {
 public:
  explicit EvalBundle(const json& model = json::object()) : FakeBundle(model) {
    json tokenizer = json::parse(byte_tokenizer_json());
    for (int byte = 0; byte < 256; ++byte) tokenizer["token_bytes"].push_back(1);
    for (int special = 0; special < 9; ++special) tokenizer["token_bytes"].push_back(0);
    write_file(*this / "tokenizer.json", tokenizer.dump());
    write_manifest(manifest());
  }
};

// The mean of -log p over `text`, each window of `context` bytes with <|bos|> (256) in front.
double nats_per_byte(const std::string& text, std::size_t context) {
  FakeBackend model({.vocab_size = 265});
  double sum = 0;
  for (std::size_t begin = 0; begin < text.size(); begin += context) {
    std::vector<std::int64_t> ids = {256};
    for (const char c : text.substr(begin, context)) ids.push_back(static_cast<unsigned char>(c));
    const auto logits = model.forward(std::span(ids).first(ids.size() - 1), 1, std::ssize(ids) - 1);
    for (std::int64_t t = 0; t < logits.length; ++t) {
      const auto row = logits.at(0, t);
      long double total = 0;
      for (const float logit : row) total += std::exp(static_cast<long double>(logit));
      const auto target = static_cast<std::size_t>(ids[static_cast<std::size_t>(t + 1)]);
      sum += static_cast<double>(std::log(total) - static_cast<long double>(row[target]));
    }
  }
  return sum / static_cast<double>(text.size());
}

}  // namespace

TEST_CASE("eval: bits per byte of a text, in windows and pieces") {
  const EvalBundle bundle;
  std::string text;
  for (int i = 0; i < 1000; ++i) text += static_cast<char>('a' + i % 26);
  write_file(bundle / "text.txt", text);
  const std::string file = (bundle / "text.txt").string();
  for (const std::size_t context : {400, 129, 128, 127, 1}) {  // the bundle's own, and around a piece
    CAPTURE(context);
    const Run result = run_program({"eval", bundle.path().string(), "--text", file, "--json", "--context",
                                    context == 400 ? "0" : std::to_string(context)});
    REQUIRE_MESSAGE(result.exit_code == 0, result.err);
    CHECK(result.err.empty());
    const json answer = last_line_json(result.out);
    const double nats = nats_per_byte(text, context);
    CHECK(answer["bits_per_byte"].get<double>() == doctest::Approx(nats / std::numbers::ln2).epsilon(1e-9));
    CHECK(answer["nats_per_token"].get<double>() == doctest::Approx(nats).epsilon(1e-9));
    CHECK(answer["perplexity"].get<double>() == doctest::Approx(std::exp(nats)).epsilon(1e-9));
    CHECK(answer["tokens"] == 1000);
    CHECK(answer["bytes"] == 1000);
    CHECK(answer["documents"] == 1);
    CHECK(answer["seconds"].get<double>() > 0);
  }
}

TEST_CASE("eval: of documents the first window alone") {
  const EvalBundle bundle;
  const std::string text(500, 'q');
  write_file(bundle / "docs.json", json{{"docs", {text, "", "ab"}}}.dump());
  const Run result = run_program({"eval", bundle.path().string(), "--docs", (bundle / "docs.json").string(), "--json"});
  REQUIRE_MESSAGE(result.exit_code == 0, result.err);
  const json answer = last_line_json(result.out);
  CHECK(answer["tokens"] == 402);
  CHECK(answer["documents"] == 3);
  const double nats = (nats_per_byte(text.substr(0, 400), 400) * 400 + nats_per_byte("ab", 400) * 2) / 402;
  CHECK(answer["nats_per_token"].get<double>() == doctest::Approx(nats).epsilon(1e-9));
}

TEST_CASE("tokenize prints the windows of eval") {
  const EvalBundle bundle;
  write_file(bundle / "docs.json", R"(["abcd", "", "xy"])");
  const auto windows = [&](const char* option) {
    const Run result =
        run_program({"tokenize", bundle.path().string(), option, (bundle / "docs.json").string(), "--context", "3"});
    REQUIRE_MESSAGE(result.exit_code == 0, result.err);
    return json::parse(result.out);
  };
  const json docs = windows("--docs");
  CHECK(docs["context"] == 3);
  CHECK(docs["documents"] == 3);
  REQUIRE(docs["windows"].size() == 2);
  CHECK(docs["windows"][0] == json{{"document", 0}, {"ids", {256, 'a', 'b', 'c'}}});
  CHECK(docs["windows"][1] == json{{"document", 2}, {"ids", {256, 'x', 'y'}}});
  const json text = windows("--text");
  CHECK(text["windows"].size() == 6);  // 18 bytes
  CHECK(text["windows"][5] == json{{"document", 0}, {"ids", {256, 'y', '"', ']'}}});
}

TEST_CASE("eval: what cannot be evaluated is one line") {
  const EvalBundle bundle;
  const std::string folder = bundle.path().string();
  write_file(bundle / "text.txt", "abc");
  const std::string text = (bundle / "text.txt").string();
  CHECK(holds(refusal({"eval", folder}), "give --text FILE or --docs FILE"));
  CHECK(holds(refusal({"eval", folder, "--text", text, "--docs", text}), "excludes"));
  CHECK(holds(refusal({"eval", folder, "--text", text, "--context", "401"}), "more than the 400 tokens"));
  CHECK(holds(refusal({"eval", folder, "--text", text, "--context", "-1"}), "--context: '-1'"));
  CHECK(holds(refusal({"eval", folder, "--docs", text}), "is not valid JSON"));
  CHECK(holds(refusal({"eval", folder, "--text", folder}), "is a folder, not a text"));
  CHECK(holds(refusal({"eval", folder + "-none", "--text", text}), "no such bundle"));
  const FakeBundle old;
  CHECK(holds(refusal({"eval", old.path().string(), "--text", text}), "has no token_bytes"));
  const EvalBundle spoilt(json{{"nan_logits", true}});
  CHECK(holds(refusal({"eval", spoilt.path().string(), "--text", text}), "not finite after 1 tokens of document 1"));
}

TEST_CASE("eval ends at once on Ctrl-C, with one line and no half of a report") {
  const EvalBundle bundle(json{{"step_ms", 50}});
  write_file(bundle / "text.txt", std::string(100000, 'a'));
  check_ends_at_once({"eval", bundle.path().string(), "--text", (bundle / "text.txt").string()});
}
