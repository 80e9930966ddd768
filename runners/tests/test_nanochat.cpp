#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "error_of.h"
#include "fake_bundle.h"
#include "nanochat_x/nanochat.h"

using nanochat_x::NanoChat;
using nanochat_x::TokenId;
using nanochat_x::test::answering;
using nanochat_x::test::contains;
using nanochat_x::test::error_of;
using nanochat_x::test::FakeBundle;

TEST_CASE("a reply and its pieces: whole characters, without the token that ended it") {
  const FakeBundle bundle(answering({"caf\u00e9 {1+2}___\u20ac!."}));
  NanoChat model(bundle.path());
  std::vector<std::string> pieces;
  const std::string text = model.reply("hi", 64, 0, 50, [&](std::string_view piece) { pieces.emplace_back(piece); });
  const std::string expected = "caf\u00e9 <|python_start|>1+2<|python_end|><|output_start|>3<|output_end|>\u20ac!";
  CHECK(text == expected);
  std::string joined;
  for (const auto& piece : pieces) {
    CHECK(piece != "\xc3");
    joined += piece;
  }
  CHECK(joined == expected);
  CHECK(std::find(pieces.begin(), pieces.end(), "\u20ac") != pieces.end());
  CHECK(model.reply("hi", 3, 0) == "caf");
}

TEST_CASE("generate begins with bos, forward takes ids as they are") {
  const FakeBundle bundle;
  NanoChat model(bundle.path());
  const auto logits = model.forward({256, 'a'});
  const auto last = logits.at(0, 1);
  const auto best = std::max_element(last.begin(), last.end()) - last.begin();
  const std::vector<TokenId> ids = {best};
  const bool shown = best != 256 && best != 260;
  CHECK(model.generate("a", 1, 0) == (shown ? model.tokenizer().decode(ids) : ""));
  const auto two = model.forward({256, 'a', 1, 2}, 2);
  CHECK(two.batch == 2);
  CHECK(std::equal(last.begin(), last.end(), two.at(0, 1).begin()));
  auto session = model.new_session();
  CHECK(std::equal(last.begin(), last.end(), session.append(std::vector<TokenId>{256, 'a'}, 2).at(0, 1).begin()));
}

TEST_CASE("what forward refuses") {
  const FakeBundle bundle(nlohmann::json::object(), 10);
  NanoChat model(bundle.path());
  CHECK(contains(error_of([&] { model.forward({}); }), "at least 1"));
  CHECK(contains(error_of([&] { model.forward({1, 2, 3}, 2); }), "2 sequences"));
  CHECK(contains(error_of([&] { model.forward({1, 2}, 0); }), "0 sequences"));
  CHECK(contains(error_of([&] { model.forward({1, 2, 3, 265}, 2); }), "token id 265 at [1, 1]"));
  CHECK(contains(error_of([&] { model.forward(std::vector<TokenId>(11, 1)); }), "context of 10"));
  CHECK(contains(error_of([&] { model.generate("\xff", 1); }), "UTF-8"));
}

TEST_CASE("bundles that are refused before the backend opens them") {
  FakeBundle bundle;
  auto manifest = bundle.manifest();
  const auto opening = [&] { return error_of([&] { NanoChat model(bundle.path()); }); };
  CHECK(opening().empty());
  SUBCASE("a changed byte") {
    std::string text = nanochat_x::test::read_file(bundle / "weights.safetensors");
    text[3] = 'X';
    nanochat_x::test::write_file(bundle / "weights.safetensors", text);
    CHECK(contains(opening(), "weights.safetensors"));
  }
  SUBCASE("another target") {
    manifest["target"] = "onnx";
    bundle.write_manifest(manifest);
    CHECK(contains(opening(), "use nanochat-onnx"));
  }
  SUBCASE("a feature that no machine has") {
    manifest["machine"]["cpu_features"] = {"avx9000"};
    bundle.write_manifest(manifest);
    CHECK(contains(opening(), "avx9000"));
  }
  SUBCASE("another vocabulary than the tokenizer's") {
    manifest["model"]["vocab_size"] = 266;
    bundle.write_manifest(manifest);
    CHECK(contains(opening(), "265 tokens and its model 266"));
  }
}
