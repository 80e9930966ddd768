// The checks of the fuzz targets (runners/fuzz) can fail: each is given something broken in the place of the library's
// own, and sees it.

#include <doctest/doctest.h>

#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "../fuzz/checks.h"
#include "bundle_files.h"

using namespace nanochat_x;
using namespace nanochat_x::fuzz;

namespace {

template <typename Call>
bool sees(Call&& call) {
  try {
    call();
    return false;
  } catch (const Violation&) {
    return true;
  }
}

}  // namespace

TEST_CASE("refusals that are not one printable line are seen") {
  CHECK_FALSE(sees([] { (void)refusal([] { throw Error("a line"); }); }));
  for (const std::string text : {"", "two\nlines", "a bell\x07", "half a character \xc3"}) {
    CHECK(sees([&] { (void)refusal([&] { throw Error(text); }); }));
  }
  CHECK(sees([] { (void)refusal([] { throw std::out_of_range("of something"); }); }));
  CHECK(sees([] { (void)refusal([] { throw std::bad_alloc(); }); }));
}

TEST_CASE("a manifest reader that lets something through is seen") {
  const std::string text = test::valid_manifest().dump();
  CHECK_FALSE(sees([&] { check_manifest(text); }));
  CHECK_FALSE(sees([] { check_manifest("{"); }));
  const auto reads = [&](auto&& change) {
    return sees([&] {
      check_manifest(text, [&](std::string_view read, const std::string& where) {
        Manifest manifest = internal::parse_manifest(read, where);
        change(manifest);
        return manifest;
      });
    });
  };
  CHECK_FALSE(reads([](Manifest&) {}));
  CHECK(reads([](Manifest& m) { m.files[0].path = m.programs["full"] = "../full.so"; }));
  CHECK(reads([](Manifest& m) { m.files[0].path = "/etc/passwd"; }));
  CHECK(reads([](Manifest& m) { m.files[1].path = m.files[0].path; }));
  CHECK(reads([](Manifest& m) { m.weights = "elsewhere"; }));
  CHECK(reads([](Manifest& m) { m.head_dim = 0; }));
  CHECK(reads([](Manifest& m) { m.programs.erase("decode"); }));
  CHECK(reads([](Manifest&) { throw std::invalid_argument("stoi"); }));
}

TEST_CASE("a tokenizer that gives other ids is seen") {
  const std::string input = std::string(R"(P'(?i:[sdmt]|ll|ve|re)|\p{L}+|\p{N}|\s+)") + '\0' + "on" + '\0' + "th";
  const auto with = [](std::string_view bytes, TokenId change) {
    return sees([&] {
      check_tokenizer_file(bytes, [&](const Tokenizer& tokenizer, std::string_view text) {
        auto ids = tokenizer.encode(text);
        for (TokenId& id : ids) id += change;
        return ids;
      });
    });
  };
  CHECK_FALSE(with(input, 0));
  CHECK_FALSE(with(test::byte_tokenizer_json(), 0));
  CHECK(with(input, 1));
  CHECK(with(test::byte_tokenizer_json(), 1000));
}

TEST_CASE("a splitter with pieces in another order is seen") {
  struct Backwards {
    explicit Backwards(std::string_view pattern) : splitter(pattern) {}
    internal::Splitter splitter;
    std::vector<std::string_view> split(std::string_view text) const {
      auto pieces = splitter.split(text);
      std::ranges::reverse(pieces);
      return pieces;
    }
  };
  const auto backwards = [](std::string_view p) { return std::make_unique<Backwards>(p); };
  CHECK_FALSE(sees([] { check_splitter("\\S+|\\s+\na b c"); }));
  CHECK_FALSE(sees([] { check_splitter("(((\na b c"); }));
  CHECK(sees([&] { check_splitter("\\S+|\\s+\na b c", backwards); }));
}

TEST_CASE("a stream that forgets a held-back character is seen") {
  struct Forgetful : Utf8Stream {
    static std::string finish() { return ""; }
  };
  const std::string input =
      "\x01"
      "a\xc3\xa9\xf0\x9f";
  CHECK_FALSE(sees([&] { check_utf8(input); }));
  CHECK(sees([&] { check_utf8_with<Forgetful>(input); }));
}

TEST_CASE("a calculator that throws, or is of two minds, is seen") {
  CHECK_FALSE(sees([] { check_calculator("1,000/3"); }));
  CHECK(sees([] {
    check_calculator("1/0", [](std::string_view) -> std::optional<std::string> { throw Error("division by zero"); });
  }));
  CHECK(sees([] { check_calculator("1", [](std::string_view text) { return std::optional(std::string(text)); }); }));
  CHECK(sees([] { check_calculator("1", [](std::string_view) { return std::optional<std::string>("a\nb"); }); }));
  CHECK(sees([] {
    check_calculator("2", [](std::string_view t) { return std::optional<std::string>(t == "0.1" ? "0.10" : "0.1"); });
  }));
}

TEST_CASE("a safetensors reader that says other sizes is seen") {
  std::string header = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::string file(8, '\0');
  file[0] = static_cast<char>(header.size());
  file += header + "12345678";
  CHECK_FALSE(sees([&] { check_safetensors(file); }));
  CHECK_FALSE(sees([&] { check_safetensors("x"); }));
  CHECK(sees([&] { check_safetensors(file, [](const auto&) -> SafetensorsFile { throw Error("of what?"); }); }));
  CHECK(sees([&] { check_safetensors(file, [](const auto&) -> SafetensorsFile { throw std::bad_alloc(); }); }));
}

TEST_CASE("a session that makes a mistake is seen") {
  // Stands between session and toy model; `change` spoils what is fed.
  struct Spoilt : Backend {
    test::FakeBackend fake{{.vocab_size = SessionCheck::kVocab}};
    bool other_previous = false, other_position = false;

    Logits forward(std::span<const std::int64_t> ids, std::int64_t b, std::int64_t t) override {
      return fake.forward(ids, b, t);
    }
    Logits step(const Step& step, Cache& cache) override {
      Step spoilt = step;
      std::vector<std::int64_t> previous(step.prev_ids.begin(), step.prev_ids.end());
      std::vector<std::int64_t> position(step.position.begin(), step.position.end());
      if (other_previous) previous.back() ^= 1;
      if (other_position) position.back() -= position.back() > 0 ? 1 : 0;
      spoilt.prev_ids = previous;
      spoilt.position = position;
      return fake.step(spoilt, cache);
    }
    std::unique_ptr<Cache> new_cache(std::int64_t rows, std::int64_t capacity) override {
      return fake.new_cache(rows, capacity);
    }
  };
  // two appends of three tokens each, to one row
  const std::string input = {1, 1, 3, 0, 1, 1, 3, 0};
  const auto with = [&](auto&& change) {
    Spoilt backend;
    change(backend);
    return sees([&] { SessionCheck(backend, backend.fake, 24).run(Bytes(input)); });
  };
  CHECK_FALSE(with([](Spoilt&) {}));
  CHECK(with([](Spoilt& backend) { backend.other_previous = true; }));
  CHECK(with([](Spoilt& backend) { backend.other_position = true; }));
  CHECK_FALSE(sees([&] { check_session(input); }));
}
