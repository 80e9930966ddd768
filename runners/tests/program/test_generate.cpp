#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "nanochat_x/engine.h"
#include "nanochat_x/utf8.h"
#include "program.h"

using namespace nanochat_x::test;

namespace {

// A script's anchor is assistant_start: ids of a prompt that ends in it
const char* const kAnchored = "256,259";

}  // namespace

TEST_CASE("generate --json: ids, mask, text, stop and timing") {
  const FakeBundle bundle(answering({"a{1+2}___\xff."}));
  const Run result = run_program({"generate", bundle.path().string(), "--prompt-ids", kAnchored, "--temperature", "0",
                                  "--num-samples", "2", "--json"});
  REQUIRE_MESSAGE(result.exit_code == 0, result.err);
  const auto json = last_line_json(result.out);
  REQUIRE(json["samples"].size() == 2);
  for (const auto& sample : json["samples"]) {
    CHECK(sample["ids"] == ids_of("a{1+2}[3]\xff."));
    CHECK(sample["mask"] == std::vector<int>{1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1});
    CHECK(sample["text"] == "a<|python_start|>1+2<|python_end|><|output_start|>3<|output_end|>\ufffd<|assistant_end|>");
    CHECK(sample["stop"] == "stop_token");
  }
  const auto timing = json["timing"];
  CHECK(timing["prompt_tokens"] == 2);
  CHECK(timing["new_tokens"] == 22);
  for (const std::string key : {"load_s", "prefill_s", "decode_s", "tokens_per_s", "first_token_s"}) {
    CHECK_MESSAGE(timing[key].get<double>() > 0, key);
  }
  CHECK(timing["first_token_s"] > timing["load_s"]);
}

TEST_CASE("generate equals the library, option by option") {
  const FakeBundle bundle;
  FakeBackend model({.vocab_size = 265});
  const auto tokenizer = byte_tokenizer();
  const auto manifest = fake_manifest(265, 400);
  nanochat_x::Engine engine(model, manifest, tokenizer);
  nanochat_x::GenerateOptions options;
  options.max_tokens = 9;
  options.num_samples = 3;
  options.raw = true;
  options.sampling = {.temperature = 1.5, .top_k = 20, .top_p = 0.9, .seed = 7};
  const auto expected = engine.generate({256, 'h', 'i'}, options);
  const std::vector<std::string> common = {"generate",
                                           bundle.path().string(),
                                           "--json",
                                           "--raw",
                                           "--max-tokens",
                                           "9",
                                           "--seed",
                                           "7",
                                           "--temperature",
                                           "1.5",
                                           "--top-k",
                                           "20",
                                           "--top-p",
                                           "0.9",
                                           "-n",
                                           "3"};
  for (const auto& prompt : {std::vector<std::string>{"--prompt", "hi"}, {"--prompt-ids", "256, 104,105"}}) {
    auto arguments = common;
    arguments.insert(arguments.end(), prompt.begin(), prompt.end());
    const auto json = last_line_json(run_program(arguments).out);
    REQUIRE(json["samples"].size() == 3);
    for (std::size_t i = 0; i < 3; ++i) CHECK(json["samples"][i]["ids"] == expected.samples[i].ids);
  }
  // each makes a difference
  const std::vector<std::pair<std::string, std::string>> others = {
      {"--seed", "8"}, {"--temperature", "0.05"}, {"--top-k", "2"}, {"--top-p", "0.01"}};
  for (const auto& [option, value] : others) {
    auto arguments = common;
    arguments.insert(arguments.end(), {"--prompt", "hi"});
    *(std::find(arguments.begin(), arguments.end(), option) + 1) = value;
    const auto json = last_line_json(run_program(arguments).out);
    bool same = true;
    for (std::size_t i = 0; i < 3; ++i) same = same && json["samples"][i]["ids"] == expected.samples[i].ids;
    CHECK_MESSAGE(!same, option);
  }
}

TEST_CASE("texts that look like something else are texts") {
  const FakeBundle bundle;
  for (const std::string text : {"-5 + 3", "--help", "[1,2]", "{}", "", "/h", "a b", "<|bos|>"}) {
    const Run result =
        run_program({"generate", bundle.path().string(), "--json", "--max-tokens", "1", "--prompt", text});
    REQUIRE_MESSAGE(result.exit_code == 0, result.err);
    CHECK_MESSAGE(last_line_json(result.out)["timing"]["prompt_tokens"] == 1 + text.size(), text);
  }
}

TEST_CASE("one sample is streamed in whole characters; its text is that of the JSON") {
  const FakeBundle bundle(answering({"\u20ac\U0001f600\xe2\x82."}, 20));
  const auto arguments = command({"generate", bundle.path().string(), "--prompt-ids", kAnchored, "--temperature", "0"});
  Process process(arguments);
  CHECK(process.finish().exit_code == 0);
  CHECK(process.out == "\u20ac\U0001f600\ufffd<|assistant_end|>\n");
  CHECK(process.reads.size() >= 3);  // it came piece by piece
  for (const auto& piece : process.reads) CHECK(nanochat_x::is_valid_utf8(piece));
  auto json = arguments;
  json.push_back("--json");
  CHECK(last_line_json(run(json).out)["samples"][0]["text"].get<std::string>() + "\n" == process.out);
}

TEST_CASE("several samples are told one after the other") {
  const FakeBundle bundle(answering({"yes."}));
  const Run result = run_program(
      {"generate", bundle.path().string(), "--prompt-ids", kAnchored, "--temperature", "0", "--num-samples", "2"});
  CHECK(result.out == "--- sample 1 of 2\nyes<|assistant_end|>\n--- sample 2 of 2\nyes<|assistant_end|>\n");
}

TEST_CASE("why a sample ended") {
  const FakeBundle bundle(answering({"ab."}), 10);
  const auto stop = [&](const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {"generate", bundle.path().string(), "--temperature", "0", "--json"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return last_line_json(run_program(arguments).out)["samples"][0]["stop"].get<std::string>();
  };
  CHECK(stop({"--prompt-ids", kAnchored}) == "stop_token");
  CHECK(stop({"--prompt-ids", kAnchored, "--max-tokens", "2"}) == "max_tokens");
  CHECK(stop({"--prompt-ids", kAnchored, "--raw"}) == "context");
}

TEST_CASE("prompts that do not fit the model") {
  const FakeBundle bundle(nlohmann::json::object(), 10);
  const std::string path = bundle.path().string();
  CHECK(holds(refusal({"generate", path, "--prompt", "0123456789"}), "prompt of 11 tokens is longer"));
  CHECK(holds(refusal({"generate", path, "--prompt-ids", "1,265"}), "token id 265 at position 1"));
  CHECK(holds(refusal({"chat", path, "--prompt", "0123456789"}), "prompt of 14 tokens is longer"));
}

TEST_CASE("a model whose computation fails") {
  const FakeBundle nan(nlohmann::json{{"nan_logits", true}});
  CHECK(holds(refusal({"generate", nan.path().string(), "--prompt", "x", "--json"}), "NaN"));
  const FakeBundle failing(nlohmann::json{{"fail_at_step", 2}});
  const Run result = run_program({"generate", failing.path().string(), "--prompt", "x", "--raw", "--json"});
  CHECK(result.exit_code == 1);
  CHECK(result.out.empty());
  CHECK(result.err == "nanochat-aoti: error: internal error: the runtime failed\n");
}

TEST_CASE("Ctrl-C ends generation; what there is is told; exit code 130") {
  const FakeBundle bundle(answering({std::string(390, 'x')}, 10));
  std::vector<std::string> arguments = {"generate", bundle.path().string(), "--prompt-ids",
                                        kAnchored,  "--temperature",        "0"};
  Process streaming(command(arguments));
  streaming.wait_for("xxx");
  streaming.interrupt();
  CHECK(streaming.finish().exit_code == 130);
  CHECK(streaming.out.find_first_not_of('x') == streaming.out.size() - 1);
  CHECK(streaming.out.size() < 300);
  CHECK(streaming.out.ends_with("x\n"));
  arguments.push_back("--json");
  Process process(command(arguments));
  // nothing is said before the end: a wait long enough for the load, far too short for 256 tokens
  std::this_thread::sleep_for(std::chrono::milliseconds(1200));
  process.interrupt();
  CHECK(process.finish().exit_code == 130);
  const auto sample = last_line_json(process.out)["samples"][0];
  CHECK(sample["stop"] == "interrupt");
  CHECK(sample["ids"].size() < 256);
}
