#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <span>
#include <thread>
#include <tuple>

#include "nanochat_x/safetensors.h"
#include "program.h"

using namespace nanochat_x::test;
using nanochat_x::SafetensorsFile;

namespace {

template <typename Integer>
struct Tensor {
  std::string name;
  std::vector<std::int64_t> shape;
  std::vector<Integer> values;
  std::string dtype = sizeof(Integer) == 8 ? "I64" : "I32";
  nanochat_x::TensorToWrite to_write() const { return {name, dtype, shape, std::as_bytes(std::span(values))}; }
};

const Tensor<std::int64_t> kLong{"a.b.input_ids", {2, 5}, {1, 2, 3, 4, 5, 256, 7, 264, 9, 0}};
const Tensor<std::int32_t> kShort{"c.input_ids", {1, 1}, {77}};
const Tensor<std::int64_t> kOther{"something", {1}, {-1}};

struct Fixture {
  Fixture() { write({kLong.to_write(), kShort.to_write(), kOther.to_write()}); }
  void write(const std::vector<nanochat_x::TensorToWrite>& tensors) { nanochat_x::write_safetensors(input, tensors); }
  std::vector<std::string> arguments(const std::vector<std::string>& more = {}) const {
    std::vector<std::string> result = {"forward",  bundle.path().string(), "--input", input.string(),
                                       "--output", output.string()};
    result.insert(result.end(), more.begin(), more.end());
    return result;
  }
  FakeBundle bundle{nlohmann::json::object(), 50};
  TempDir dir;
  std::filesystem::path input = dir / "x.safetensors", output = dir / "y.safetensors";
};

std::vector<std::string> files_in(const std::filesystem::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

void check_logits(const SafetensorsFile& file, const std::string& name, std::int64_t rows, std::int64_t length,
                  const std::vector<std::int64_t>& ids) {
  FakeBackend model({.vocab_size = 265});
  const auto expected = model.forward(ids, rows, length);
  const auto& tensor = file.at(name);
  CHECK(tensor.dtype == "F32");
  CHECK(tensor.shape == std::vector<std::int64_t>{rows, length, 265});
  const auto bytes = std::as_bytes(expected.data);
  CHECK(std::equal(bytes.begin(), bytes.end(), tensor.data.begin(), tensor.data.end()));
}

}  // namespace

TEST_CASE("forward writes the logits of every NAME.input_ids, whatever the way through the cache") {
  const std::vector<std::vector<std::string>> ways = {
      {}, {"--no-cache"}, {"--chunks", "1"}, {"--chunks", "3,1"}, {"--chunks", "2, 16"}, {"--threads", "2"}};
  for (const auto& way : ways) {
    Fixture f;
    const Run result = run_program(f.arguments(way));
    REQUIRE_MESSAGE(result.exit_code == 0, result.err);
    const auto file = SafetensorsFile::open(f.output);
    CHECK(file.tensors().size() == 2);
    check_logits(file, "a.b.logits", 2, 5, kLong.values);
    check_logits(file, "c.logits", 1, 1, {77});
  }
}

TEST_CASE("an older output is replaced, but only by a whole one") {
  Fixture f;
  write_file(f.output, "old");
  auto bad = kLong;
  bad.values[6] = 265;
  f.write({bad.to_write()});
  const std::string message = refusal(f.arguments());
  CHECK(holds(message, "'a.b.input_ids'"));
  CHECK(holds(message, "265"));
  CHECK(read_file(f.output) == "old");
  f.write({kLong.to_write()});
  CHECK(run_program(f.arguments()).exit_code == 0);
  check_logits(SafetensorsFile::open(f.output), "a.b.logits", 2, 5, kLong.values);
}

TEST_CASE("what forward refuses, and nothing is written") {
  Fixture f;
  const auto refused = [&f](const std::string& part) {
    CHECK_MESSAGE(holds(refusal(f.arguments()), part), part);
    CHECK_FALSE(std::filesystem::exists(f.output));
  };
  f.write({kOther.to_write()});
  refused("no tensor named NAME.input_ids");
  f.write({{"a.input_ids", "F32", {1, 2}, std::as_bytes(std::span(kLong.values)).first(8)}});
  refused("'a.input_ids' has dtype F32");
  f.write({Tensor<std::int64_t>{"a.input_ids", {2}, {1, 2}}.to_write()});
  refused("'a.input_ids' has shape [2]");
  f.write({Tensor<std::int64_t>{"a.input_ids", {1, 0}, {}}.to_write()});
  refused("'a.input_ids' has shape [1, 0]");
  f.write({Tensor<std::int64_t>{"a.input_ids", {1, 1}, {-1}}.to_write()});
  refused("token id -1");
  f.write({Tensor<std::int64_t>{"a.input_ids", {1, 51}, std::vector<std::int64_t>(51)}.to_write()});
  refused("51 tokens, longer than the model's context of 50");
  write_file(f.input, "no tensors");
  refused("x.safetensors");
  std::filesystem::remove(f.input);
  refused("x.safetensors");
}

TEST_CASE("an output that cannot be meant is refused before anything is computed") {
  Fixture f;
  const auto before = read_file(f.input);
  f.output = f.input;
  CHECK(holds(refusal(f.arguments()), "is the input itself"));
  CHECK(read_file(f.input) == before);
  f.output = f.dir.path();
  CHECK(holds(refusal(f.arguments()), "is a folder"));
  f.output = f.dir / "no/such/y.safetensors";
  CHECK(holds(refusal(f.arguments()), "is not a folder"));
}

TEST_CASE("a signal while it loads or computes: one line, nothing written") {
  Fixture f;
  write_file(f.bundle / "fake.json", nlohmann::json{{"step_ms", 8000}}.dump());
  f.bundle.write_manifest(f.bundle.manifest());
  for (const auto& [number, code, line] :
       {std::tuple{SIGINT, 130, "interrupted"}, {SIGTERM, 143, "ended by SIGTERM"}, {SIGHUP, 129, "ended by SIGHUP"}}) {
    Process process(command(f.arguments()));
    std::this_thread::sleep_for(std::chrono::milliseconds(1200));
    process.send(number);
    CHECK(process.finish().exit_code == code);
    CHECK(process.err == std::string("nanochat-aoti: ") + line + "\n");
    CHECK(process.out.empty());
    CHECK(files_in(f.dir.path()) == std::vector<std::string>{"x.safetensors"});
  }
}

TEST_CASE("a signal in the middle of the write leaves the older output and nothing else") {
  Fixture f;
  // 1,500 x 50 x 265 logits are 80 MB, the toy computes them in no time
  const Tensor<std::int64_t> many{"a.input_ids", {1500, 50}, std::vector<std::int64_t>(1500 * 50, 7)};
  f.write({many.to_write()});
  const auto unfinished = [&f] {
    const auto files = files_in(f.dir.path());
    return std::any_of(files.begin(), files.end(), [](const std::string& name) { return holds(name, ".tmp-"); });
  };
  for (const int number : {SIGINT, SIGTERM}) {
    // Where the tests' own process is held up, the write may be done before the signal comes: then once more.
    for (int attempt = 0; attempt < 10; ++attempt) {
      write_file(f.output, "old");
      Process process(command(f.arguments({"--no-cache"})));
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
      while (!unfinished() && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
      process.send(number);
      const Ended ended = process.finish();
      CHECK(files_in(f.dir.path()) == std::vector<std::string>{"x.safetensors", "y.safetensors"});
      if (ended.exit_code == 0) continue;
      CHECK(ended.exit_code == 128 + number);
      CHECK(holds(process.err, number == SIGINT ? "interrupted" : "ended by SIGTERM"));
      CHECK(read_file(f.output) == "old");
      break;
    }
    CHECK(read_file(f.output) == "old");
  }
}
