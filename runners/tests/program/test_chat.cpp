#include <doctest/doctest.h>

#include <chrono>
#include <thread>

#include "program.h"

using namespace nanochat_x::test;
using nlohmann::json;

namespace {

using Ids = std::vector<nanochat_x::TokenId>;

const std::string kPrompt = "\nUser: ";

// <|user_start|> text <|user_end|> <|assistant_start|>
Ids user_turn(const std::string& text) {
  Ids ids = {257};
  for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
  ids.insert(ids.end(), {258, 259});
  return ids;
}

Ids operator+(Ids a, const Ids& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

std::vector<std::string> chat(const FakeBundle& bundle, const std::vector<std::string>& more = {}) {
  std::vector<std::string> arguments = {"chat", bundle.path().string(), "--temperature", "0"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

}  // namespace

TEST_CASE("chat --prompt: one reply, the calculator's part readable") {
  const FakeBundle bundle(answering({"It is {1+2}___!.", "?"}));
  const Run result = run_program(chat(bundle, {"--prompt", "1+2"}));
  CHECK(result.exit_code == 0);
  CHECK(result.out == "It is [1+2 = 3]!\n");
  CHECK(result.err.empty());
}

TEST_CASE("how a reply's special tokens are told") {
  const auto told = [](const std::string& script) {
    const FakeBundle bundle(answering({script}));
    return run_program(chat(bundle, {"--prompt", "x", "--max-tokens", std::to_string(script.size())})).out;
  };
  CHECK(told("{1/0}a.") == "[1/0] a\n");  // no result
  CHECK(told("{1+2}") == "[1+2]\n");      // cut before the result
  CHECK(told("{1+2}__") == "[1+2 = 3]\n");
  CHECK(told("{1+2}___So.") == "[1+2 = 3] So\n");
  CHECK(told("{1+2}___ So.") == "[1+2 = 3] So\n");
  CHECK(told("{12") == "[12]\n");
  CHECK(told("{1/0}[5]a.") == "[1/0]<|output_start|>5<|output_end|>a\n");  // not the calculator's word
  CHECK(told("a}b.") == "a<|python_end|>b\n");
  CHECK(told("{1{2}___.") == "[1<|python_start|>2 = 2]\n");
  CHECK(told("\xe2\x82{1}___.") == "\ufffd[1 = 1]\n");
}

TEST_CASE("chat --script --json has the shape of nanochat's transcripts") {
  const FakeBundle bundle(answering({"A{2*3}___.", "BBBBBB", "C."}));
  TempDir dir;
  write_file(dir / "script.json", R"([["one", "t\u00e9"], [], ["three"]])");
  const Run result =
      run_program(chat(bundle, {"--script", (dir / "script.json").string(), "--json", "--max-tokens", "9"}));
  REQUIRE_MESSAGE(result.exit_code == 0, result.err);
  const json conversations = last_line_json(result.out);
  REQUIRE(conversations.size() == 3);
  REQUIRE(conversations[0].size() == 2);
  CHECK(conversations[1] == json::array());
  const json& first = conversations[0][0];
  CHECK(first.size() == 5);
  CHECK(first["user"] == "one");
  const Ids prompt = Ids{256} + user_turn("one"), reply = ids_of("A{2*3}[6]");  // cut at nine
  CHECK(first["prompt_ids"] == prompt);
  CHECK(first["new_ids"] == reply);
  CHECK(first["sampled_mask"] == std::vector<int>{1, 1, 1, 1, 1, 1, 0, 0, 0});
  CHECK(first["text"] == "A<|python_start|>2*3<|python_end|><|output_start|>6<|output_end|>");
  CHECK(conversations[0][1]["user"] == "t\u00e9");
  CHECK(conversations[0][1]["prompt_ids"] == prompt + reply + Ids{260} + user_turn("t\u00e9"));
  // a new conversation begins anew, with the first script
  CHECK(conversations[2][0]["prompt_ids"] == Ids{256} + user_turn("three"));
  CHECK(conversations[2][0]["new_ids"] == reply);
}

TEST_CASE("chat --script without --json is a transcript to read") {
  const FakeBundle bundle(answering({"yes.", "no."}));
  TempDir dir;
  write_file(dir / "script.json", R"([["a", "b"], ["c"]])");
  const Run result = run_program(chat(bundle, {"--script", (dir / "script.json").string()}));
  CHECK(result.out == "User: a\n\nAssistant: yes\n\nUser: b\n\nAssistant: no\n\n---\n\nUser: c\n\nAssistant: yes\n\n");
}

TEST_CASE("a malformed script: one line, exit code 2") {
  const FakeBundle bundle(answering({"yes."}), 20);
  TempDir dir;
  const auto refused = [&](const std::string& text, const std::string& part) {
    write_file(dir / "script.json", text);
    CHECK_MESSAGE(holds(refusal(chat(bundle, {"--script", (dir / "script.json").string(), "--json"})), part), text);
  };
  refused("", "is not JSON");
  refused("[[\"a\"]", "is not JSON");
  refused("[[\"\xff\"]]", "is not JSON");
  refused(R"([["\ud800"]])", "is not JSON");
  refused("{}", "is not a list");
  refused(R"(["a"])", "conversation 1 is not a list");
  refused(R"([["a"], ["b", 3]])", "conversation 2, turn 2 is not a string");
  const auto script = [&](const std::string& path) { return refusal(chat(bundle, {"--script", path, "--json"})); };
  CHECK(holds(script((dir / "nowhere.json").string()), "nowhere.json"));
  CHECK(holds(script(dir.path().string()), "is a folder"));
}

TEST_CASE("a script that an error ends: the finished turns as JSON, and the error's line") {
  const FakeBundle bundle(answering({"yes."}), 20);
  TempDir dir;
  write_file(dir / "script.json", R"([["a", "b"], ["c", "0123456789abcdefghij", "d"], ["e"]])");
  const Run result = run_program(chat(bundle, {"--script", (dir / "script.json").string(), "--json"}));
  CHECK(result.exit_code == 2);
  CHECK(holds(result.err, "conversation 2, turn 2: prompt of 32 tokens is longer"));
  CHECK(result.err.find('\n') == result.err.size() - 1);
  CHECK(result.out.find('\n') == result.out.size() - 1);
  const json conversations = last_line_json(result.out);
  REQUIRE(conversations.size() == 2);  // the third was never begun
  CHECK(conversations[0].size() == 2);
  REQUIRE(conversations[1].size() == 1);
  CHECK(conversations[1][0]["user"] == "c");
}

TEST_CASE("a script, interrupted: the finished turns, one line, exit code 130") {
  const FakeBundle bundle(answering({"a.", std::string(300, 'x')}, 10));
  TempDir dir;
  write_file(dir / "script.json", R"([["one", "two"], ["three"]])");
  const auto arguments = chat(bundle, {"--script", (dir / "script.json").string()});
  Process reading(command(arguments));
  reading.wait_for("Assistant: xxx");
  reading.interrupt();
  CHECK(reading.finish().exit_code == 130);
  CHECK(reading.err == "nanochat-aoti: interrupted\n");
  CHECK(reading.out.ends_with("x\n"));
  auto with_json = arguments;
  with_json.push_back("--json");
  Process process(command(with_json));
  std::this_thread::sleep_for(std::chrono::milliseconds(1200));  // nothing is said before the end
  process.interrupt();
  CHECK(process.finish().exit_code == 130);
  CHECK(process.err == "nanochat-aoti: interrupted\n");
  const json conversations = last_line_json(process.out);
  REQUIRE(conversations.size() == 1);
  REQUIRE(conversations[0].size() == 1);
  CHECK(conversations[0][0]["user"] == "one");
}

TEST_CASE("an interactive conversation: turns, commands, the end of the input") {
  const FakeBundle bundle(answering({"first.", "second.", "third."}));
  const Run result = run_program(chat(bundle), "hi\n  \nagain\n CLEAR \nhi\n/help\nlast");
  CHECK(result.exit_code == 0);
  CHECK(result.err.empty());
  const std::string expected = kPrompt + "\nAssistant: first\n" + kPrompt + kPrompt + "\nAssistant: second\n" +
                               kPrompt + "A new conversation begins.\n" + kPrompt + "\nAssistant: first\n" + kPrompt;
  const std::size_t begin = result.out.find(kPrompt);
  CHECK(result.out.substr(begin, expected.size()) == expected);
  CHECK(holds(result.out, "Ctrl-C"));
  CHECK(result.out.ends_with("\nAssistant: second\n" + kPrompt + "\nGoodbye!\n"));
  for (const char* word : {"quit", "exit", "Quit"}) {
    const Run quit = run_program(chat(bundle), std::string(word) + "\nhi\n");
    CHECK(quit.exit_code == 0);
    CHECK(quit.out.ends_with(kPrompt + "Goodbye!\n"));
  }
}

TEST_CASE("input that is not UTF-8") {
  const FakeBundle bundle(answering({"yes."}));
  const Run piped = run_program(chat(bundle), "\xff\nhi\n");
  CHECK(piped.exit_code == 2);
  CHECK(piped.err ==
        "nanochat-aoti: error: a line of standard input is not valid UTF-8; the tokenizer takes UTF-8 text "
        "alone\n");
  Process typed(command(chat(bundle)), Process::Streams::terminal);
  typed.wait_for(kPrompt);
  typed.write("\xff\n");
  typed.wait_for("was left out");
  typed.write("hi\n");
  typed.wait_for("Assistant: yes");
}

TEST_CASE("a full context is told, with what to do about it") {
  const FakeBundle bundle(answering({"abcdefghijklmnopqrst."}), 20);
  const Run result = run_program(chat(bundle), "hi\nmore\nclear\n0123456789abcdefg\nyo\n");
  CHECK(result.exit_code == 0);
  // 6 tokens of prompt leave room for 15 new ones, the last of which is not fed
  CHECK(holds(result.out, "Assistant: abcdefghijklmno\n[The context of 20 tokens is full: type 'clear'"));
  CHECK(holds(result.out, kPrompt + "[The context of 20 tokens is full"));  // "more" did not fit
  // neither did the long message, which is forgotten: the next one begins the conversation
  CHECK(
      holds(result.out, "begins.\n" + kPrompt + "[That message takes 21 tokens, more than the whole context of 20: "));
  CHECK(result.out.find("abcdefghijklmno", result.out.find("begins.")) != std::string::npos);
  const Run prompt = run_program(chat(bundle, {"--prompt", "hi"}));
  CHECK(prompt.out == "abcdefghijklmno\n");
  CHECK(holds(prompt.err, "note: the reply was cut"));
}

TEST_CASE("Ctrl-C during a reply ends the reply, at the prompt the program") {
  const FakeBundle bundle(answering({std::string(300, 'x'), "second."}, 10));
  for (const auto streams : {Process::Streams::pipes, Process::Streams::terminal}) {
    Process process(command(chat(bundle)), streams);
    const auto interrupt = [&] { streams == Process::Streams::terminal ? process.write("\x03") : process.interrupt(); };
    process.wait_for(kPrompt);
    process.write("hi\n");
    process.wait_for("Assistant: xxx");
    interrupt();
    process.wait_for("\n" + kPrompt);
    process.write("again\n");  // the conversation goes on: the second script
    process.wait_for("Assistant: second\n" + kPrompt);
    interrupt();
    const Ended ended = process.finish();
    CHECK(ended.exit_code == 130);
    CHECK(process.err.empty());
    CHECK(process.out.ends_with(kPrompt + "\n"));
  }
}

TEST_CASE("Ctrl-C before a reply's first token leaves the conversation as it was") {
  // A step feeds at most 256 tokens of a prompt: the message takes two, and the interrupt comes during the first.
  const FakeBundle bundle(answering({"first.", "second."}, 400), 1000);
  Process process(command(chat(bundle)));
  process.wait_for(kPrompt);
  process.write(std::string(300, 'x') + "\n");
  process.wait_for("Assistant: ");
  process.interrupt();
  process.wait_for("\n[Ended before the reply began: the message was left out.]\n" + kPrompt);
  process.write("hi\n");  // the model still gives the first script: no turn came before
  process.wait_for("Assistant: first\n");
}

TEST_CASE("an error within the calculator's part gives the terminal its style back") {
  nlohmann::json model = answering({"{1+2}___."});
  model["fail_at_step"] = 4;
  const FakeBundle bundle(model);
  Process process(command(chat(bundle, {"--prompt", "hi"})), Process::Streams::terminal);
  process.wait_for("\x1b[2m[1");
  CHECK(process.finish().exit_code != 0);
  CHECK(process.out.ends_with("\x1b[0m"));
  CHECK(holds(process.err, "the runtime failed"));
}

TEST_CASE("chat --prompt, interrupted") {
  const FakeBundle bundle(answering({std::string(300, 'x')}, 10));
  Process process(command(chat(bundle, {"--prompt", "hi"})));
  process.wait_for("xxx");
  process.interrupt();
  CHECK(process.finish().exit_code == 130);
  CHECK(process.out.ends_with("x\n"));
}

TEST_CASE("on a terminal the calculator's part is dimmed and Ctrl-D ends the program") {
  const FakeBundle bundle(answering({"{1+2}___."}));
  Process process(command(chat(bundle)), Process::Streams::terminal);
  process.wait_for(kPrompt);
  process.write("hi\n");
  process.wait_for("Assistant: \x1b[2m[1+2 = 3]\x1b[0m\n");
  process.wait_for(kPrompt);
  process.write("\x04");
  CHECK(process.finish().exit_code == 0);
  CHECK(process.out.ends_with("\nGoodbye!\n"));
}
