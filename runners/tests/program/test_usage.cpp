#include <doctest/doctest.h>

#include "program.h"

using namespace nanochat_x::test;

TEST_CASE("help and version are told on standard output") {
  for (const char* verb : {"chat", "generate", "forward", "eval", "tokenize", "info"}) {
    const Run help = run_program({verb, "--help"});
    CHECK(help.exit_code == 0);
    CHECK(holds(help.out, "BUNDLE"));
    CHECK(holds(run_program({"--help"}).out, verb));
  }
  const Run version = run_program({"--version"});
  CHECK(version.exit_code == 0);
  CHECK(version.out.starts_with("nanochat-aoti "));
  CHECK(holds(version.out, "2.13.0"));
}

TEST_CASE("a command line that cannot be meant: one line, exit code 2") {
  CHECK(holds(refusal({}), "the verbs are chat, generate, forward, eval, bench, tokenize, info and session"));
  CHECK(holds(refusal({"talk"}), "there is no verb 'talk'"));
  CHECK(holds(refusal({"--bogus"}), "see nanochat-aoti --help"));
  CHECK(holds(refusal({"chat"}), "BUNDLE is required"));
  CHECK(holds(refusal({"chat", "b", "--bogus"}), "--bogus"));
  CHECK(holds(refusal({"chat", "b", "--json"}), "--json requires --script"));
  CHECK(holds(refusal({"chat", "b", "--prompt", "x", "--script", "y"}), "excludes"));
  CHECK(holds(refusal({"chat", "b", "--prompt", ""}), "--prompt is empty"));
  CHECK(holds(refusal({"chat", "b", "--prompt", "\xff"}), "--prompt is not valid UTF-8"));
  CHECK(holds(refusal({"chat", "b", "--top-k", "a"}), "--top-k"));
  CHECK(holds(refusal({"chat", "b", "--threads", "-1"}), "--threads"));
  CHECK(holds(refusal({"generate", "b"}), "give --prompt or --prompt-ids"));
  CHECK(holds(refusal({"generate", "b", "--prompt"}), "--prompt"));
  CHECK(holds(refusal({"generate", "b", "--prompt", "\xc3"}), "--prompt is not valid UTF-8"));
  CHECK(holds(refusal({"generate", "b", "--prompt", "x", "--prompt-ids", "1"}), "excludes"));
  for (const std::string ids : {"", "1,,2", "1,x", "1;2", "-1", "1.5", "99999999999999999999"}) {
    CHECK_MESSAGE(holds(refusal({"generate", "b", "--prompt-ids", ids}), "--prompt-ids: '"), ids);
  }
  const auto generate = [](const char* option, const char* value) {
    return refusal({"generate", "b", "--prompt", "x", option, value});
  };
  CHECK(holds(generate("--temperature", "-1"), "temperature"));
  CHECK(holds(generate("--temperature", "nan"), "temperature"));
  CHECK(holds(generate("--top-k", "-1"), "--top-k: '-1' is not an integer of at least 0"));
  CHECK(holds(generate("--top-p", "0"), "top_p"));
  CHECK(holds(generate("--top-p", "1.1"), "top_p"));
  CHECK(holds(generate("--seed", "-1"), "--seed"));
  CHECK(holds(generate("--max-tokens", "-1"), "--max-tokens: '-1' is not an integer of at least 1"));
  CHECK(holds(generate("--num-samples", "0"), "--num-samples: '0' is not an integer of at least 1"));
  CHECK(holds(generate("--num-samples", "1000000000"), "num_samples must be at most 65536"));
  CHECK(holds(refusal({"forward", "b"}), "is required"));
  CHECK(holds(refusal({"forward", "b", "--input", "x", "--output", "y", "--chunks", "0"}), "--chunks: '0'"));
  CHECK(holds(refusal({"forward", "b", "--input", "x", "--output", "y", "--chunks", "1", "--no-cache"}), "excludes"));
}

TEST_CASE("numbers are as strict as in Python: no other base, nothing empty, nothing too large") {
  const auto generate = [](const char* option, const std::string& value) {
    return refusal({"generate", "b", "--prompt", "x", option, value});
  };
  const char* const kNoBundle = "there is no such bundle";
  for (const char* option : {"--max-tokens", "--top-k", "--seed", "--num-samples", "--threads"}) {
    for (const std::string value : {"", " ", "0x10", "+1", "-0", "1.0", "1e3", "1'0", "1_0", "9 9", "\xff",
                                    "18446744073709551616", "99999999999999999999999"}) {
      const std::string said = generate(option, value);
      CHECK_MESSAGE(holds(said, std::string(option) + ": '"), option, " ", value);
      CHECK_MESSAGE(holds(said, "is not an integer of at least"), option, " ", value);
    }
    CHECK_MESSAGE(holds(generate(option, " 1 "), kNoBundle), option);  // what is wrong then is the bundle alone
  }
  CHECK(holds(generate("--max-tokens", "9223372036854775808"), "at most 9223372036854775807"));
  CHECK(holds(generate("--max-tokens", "9223372036854775807"), kNoBundle));
  CHECK(holds(generate("--max-tokens", "0"), "at least 1"));
  CHECK(holds(generate("--seed", "18446744073709551615"), kNoBundle));
  CHECK(holds(generate("--threads", "4097"), "at most 4096"));
  CHECK(holds(generate("--threads", "0"), kNoBundle));
  for (const char* option : {"--temperature", "--top-p"}) {
    for (const std::string value : {"", " ", "0x1p3", "inf", "nan", "1e999", "1,5", "1.0.0", "e", ".", "0.5 0.5"}) {
      CHECK_MESSAGE(holds(generate(option, value), std::string(option) + ": '" + value + "' is not a number"), value);
    }
    for (const std::string value : {"0.5", " .5 ", "+5e-1"})
      CHECK_MESSAGE(holds(generate(option, value), kNoBundle), value);
  }
  CHECK(holds(refusal({"generate", "b", "--prompt-ids", "1,-0"}), "--prompt-ids: '-0'"));
  const Run help = run_program({"generate", "--help"});
  for (const std::string shown : {"INT=256", "FLOAT=0.6"}) {  // CLI11 2.5 on: INT [256]
    const std::size_t at = shown.find('=');
    const std::string newer = shown.substr(0, at) + " [" + shown.substr(at + 1) + "]";
    CHECK_MESSAGE((holds(help.out, shown) || holds(help.out, newer)), shown);
  }
}

TEST_CASE("a bundle that is not there or not whole: one line, exit code 2, by every verb") {
  const FakeBundle bundle;
  const std::string path = bundle.path().string();
  TempDir dir;
  write_file(dir / "x.safetensors", read_file(bundle / "fake.json"));
  const auto all = [&](const std::string& folder, const std::string& part) {
    CHECK_MESSAGE(holds(refusal({"chat", folder, "--prompt", "x"}), part), part);
    CHECK_MESSAGE(holds(refusal({"generate", folder, "--prompt", "x"}), part), part);
    CHECK_MESSAGE(holds(refusal({"info", folder}), part), part);
  };
  all((dir / "nowhere").string(), "nowhere");
  all(dir.path().string(), "manifest.json");
  write_file(bundle / "weights.safetensors", kTwoBlocks + "x");
  all(path, "weights.safetensors");
}

TEST_CASE("info tells what a bundle holds and whether it runs here") {
  FakeBundle bundle;
  const auto info = [&] { return last_line_json(run_program({"info", bundle.path().string(), "--json"}).out); };
  CHECK(info()["runs_here"] == true);
  CHECK(info()["obstacle"].is_null());
  CHECK(info()["vocab_size"] == 265);
  CHECK(info()["files"].size() == 3);
  const Run text = run_program({"info", bundle.path().string()});
  CHECK(text.exit_code == 0);
  CHECK(holds(text.out, "smear: 4 layers"));
  CHECK(holds(text.out, "can run it"));
  auto manifest = bundle.manifest();
  manifest["machine"]["cpu_features"] = {"avx9000"};
  bundle.write_manifest(manifest);
  CHECK(info()["runs_here"] == false);
  CHECK(holds(info()["obstacle"], "avx9000"));
  CHECK(holds(run_program({"info", bundle.path().string()}).out, "cannot run it"));
}

TEST_CASE("what a manifest says cannot steer the terminal") {
  FakeBundle bundle;
  auto manifest = bundle.manifest();
  manifest["model"]["generation"] = "a\x1b[31m\nb";
  manifest["machine"]["march"] = "\xc2\x9b[2J";
  bundle.write_manifest(manifest);
  const Run text = run_program({"info", bundle.path().string()});
  CHECK(text.exit_code == 0);
  CHECK(holds(text.out, "a\\x1b[31m\\x0ab: 4 layers"));
  CHECK(holds(text.out, "\\xc2\\x9b[2J"));
  CHECK_FALSE(holds(text.out, "\x1b"));
  CHECK_FALSE(holds(text.out, "\x9b"));
}

TEST_CASE("standard output that cannot be written to") {
  const FakeBundle bundle(answering({"hello"}));
  const std::string self = NANOCHAT_FAKE;
  const Run full = run({"/bin/sh", "-c", "exec \"$0\" info \"$1\" > /dev/full", self, bundle.path().string()});
  CHECK(full.exit_code == 2);
  CHECK(holds(full.err, "cannot write to standard output"));
  Process process(command({"generate", bundle.path().string(), "--prompt", "x", "--raw", "--max-tokens", "300"}));
  process.close_output();
  const Ended ended = process.finish();
  CHECK(ended.signal == 13);  // SIGPIPE, as other tools end
  CHECK(process.err.empty());
}
