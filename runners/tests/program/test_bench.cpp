#include <doctest/doctest.h>

#include <algorithm>

#include "nanochat_x/safetensors.h"
#include "program.h"

using namespace nanochat_x;
using namespace nanochat_x::test;
using nlohmann::json;

namespace {

// A fake bundle whose weights are a real file: 1000 bytes of a matrix, and a table of 10 rows of 8 bytes.
class BenchBundle : public FakeBundle {
 public:
  explicit BenchBundle(const json& model = json::object(), std::int64_t max_seq_len = 400)
      : FakeBundle(model, max_seq_len) {
    const std::vector<std::byte> zeros(1000);
    const std::vector<TensorToWrite> tensors = {
        {.name = "model.lm_head.weight", .dtype = "F32", .shape = {250}, .data = zeros},
        {.name = "model.transformer.wte.weight",
         .dtype = "BF16",
         .shape = {10, 4},
         .data = std::span(zeros).first(80)}};
    write_safetensors(*this / "weights.safetensors", tensors);
    write_manifest(manifest());
  }
};

// What every spread holds to.
void check_spread(const json& spread) {
  CHECK(spread["min"].get<double>() > 0);
  CHECK(spread["min"].get<double>() <= spread["median"].get<double>());
  CHECK(spread["median"].get<double>() <= spread["max"].get<double>());
}

json bench(const FakeBundle& bundle, std::vector<std::string> options) {
  options.insert(options.begin(), {"bench", bundle.path().string(), "--json", "--read-mb", "1"});
  const Run result = run_program(options);
  REQUIRE_MESSAGE(result.exit_code == 0, result.err);
  CHECK(result.err.empty());
  return last_line_json(result.out);
}

}  // namespace

TEST_CASE("bench: rates are tokens over seconds, in the order that was asked for") {
  const BenchBundle bundle;
  const json report =
      bench(bundle, {"--prompt-tokens", "20", "--decode-tokens", "6", "--batch", "3,1", "--samples", "5,2",
                     "--contexts", "7,398", "--repeats", "3", "--threads", "2", "--matmul-gflops", "0.5"});
  CHECK(report["threads"] == 2);
  CHECK(report["repeats"] == 3);
  CHECK(report["limits"]["matmul_flops_per_s"] == 5e8);
  check_spread(report["limits"]["read_bytes_per_s"]);
  for (const char* key : {"load_s", "first_token_s", "first_token_of_1_s"}) check_spread(report["start"][key]);

  struct Expected {
    const char* what;
    int rows, context, tokens;
  };
  const std::vector<Expected> lines = {{"prefill", 3, 0, 20}, {"decode", 3, 20, 6},  {"prefill", 1, 0, 20},
                                       {"decode", 1, 20, 6},  {"samples", 5, 20, 6}, {"samples", 2, 20, 6},
                                       {"decode", 1, 7, 6},   {"decode", 1, 398, 2}};
  REQUIRE(report["lines"].size() == lines.size());
  for (std::size_t i = 0; i < lines.size(); ++i) {
    CAPTURE(i);
    const json& line = report["lines"][i];
    const Expected& want = lines[i];
    CHECK(line["what"] == want.what);
    CHECK(line["rows"] == want.rows);
    CHECK(line["context"] == want.context);
    CHECK(line["tokens"] == want.tokens);
    REQUIRE(line["seconds"].size() == 3);
    check_spread(line["tokens_per_s"]);
    std::vector<double> rates;
    for (const double seconds : line["seconds"]) rates.push_back(want.rows * want.tokens / seconds);
    std::ranges::sort(rates);
    CHECK(line["tokens_per_s"]["median"].get<double>() == doctest::Approx(rates[1]));
    CHECK(line["tokens_per_s"]["max"].get<double>() == doctest::Approx(rates[2]));
    const json& limit = line["limit"];
    const bool prefill = line["what"] == "prefill";
    const double reading = report["limits"]["read_bytes_per_s"]["max"];
    const double allowed = prefill ? 5e8 * want.rows * want.tokens / line["operations"].get<double>()
                                   : reading * want.rows / line["bytes_per_step"].get<double>();
    CHECK(limit["tokens_per_s"].get<double>() == doctest::Approx(allowed));
    CHECK(limit["share"].get<double>() == doctest::Approx(rates[1] / allowed));
    CHECK(limit["above"] == (limit["share"].get<double>() > 1.2));
  }
}

TEST_CASE("bench: bytes of a step: the file's matrices, a table's row, the live cache") {
  const BenchBundle bundle;
  const json report = bench(
      bundle, {"--prompt-tokens", "20", "--decode-tokens", "5", "--batch", "2", "--samples", "3", "--repeats", "1"});
  // 4 layers, keys and values of 3 heads of 16 in bfloat16; 20 to 24 tokens are there before a step
  const double cache = 22.0 * 4 * 2 * 3 * 16 * 2;
  CHECK(report["lines"][1]["bytes_per_step"].get<double>() == doctest::Approx(1000 + 2 * (8 + cache)));
  // of samples the 20 are there once, and 0 to 4 in each row
  CHECK(report["lines"][2]["bytes_per_step"].get<double>() ==
        doctest::Approx(1000 + 3 * 8 + (20.0 + 3 * 2) * 4 * 2 * 3 * 16 * 2));
  CHECK(report["memory"]["cache_bytes"] == 25 * 4 * 2 * 3 * 16 * 2);
  CHECK(report["memory"]["weights_bytes"] == std::filesystem::file_size(bundle / "weights.safetensors"));
  const double peak = report["memory"]["peak_bytes"];
  CHECK(peak > 1e6);
  CHECK(report["memory"]["ratio"].get<double>() ==
        doctest::Approx(
            peak / (report["memory"]["cache_bytes"].get<double>() + report["memory"]["weights_bytes"].get<double>())));
}

TEST_CASE("bench: a slower model is measured as slower, and a limit that is far too low is marked") {
  const BenchBundle bundle(json{{"step_ms", 20}});
  const std::vector<std::string> options = {"--prompt-tokens", "4", "--decode-tokens", "5",   "--batch", "1",
                                            "--repeats",       "2", "--matmul-gflops", "1e-6"};
  const json report = bench(bundle, options);
  for (const double seconds : report["lines"][1]["seconds"]) CHECK(seconds >= 5 * 0.020);
  CHECK(report["lines"][0]["limit"]["above"] == true);
  CHECK(report["lines"][1]["limit"]["above"] == false);
  std::vector<std::string> command = {"bench", bundle.path().string(), "--read-mb", "1"};
  command.insert(command.end(), options.begin(), options.end());
  const Run result = run_program(command);
  CHECK(holds(result.out, " % !\n"));
  CHECK(holds(result.out, "! far above its limit"));
}

TEST_CASE("bench: lengths that the bundle takes, where none are given") {
  for (const auto& [most, prompt, decode] :
       {std::tuple{400, 300, 100}, std::tuple{2048, 512, 128}, std::tuple{2, 1, 1}, std::tuple{600, 472, 128}}) {
    const BenchBundle bundle(json::object(), most);
    const json report = bench(bundle, {"--batch", "1", "--repeats", "1"});
    CHECK(report["prompt_tokens"] == prompt);
    CHECK(report["decode_tokens"] == decode);
    CHECK(report["limits"]["matmul_flops_per_s"].is_null());
    CHECK(report["lines"][0]["limit"]["share"].is_null());
  }
}

TEST_CASE("bench: what cannot be measured is one line") {
  const BenchBundle bundle;
  const std::string folder = bundle.path().string();
  CHECK(holds(refusal({"bench", folder + "-none"}), "no such bundle"));
  CHECK(holds(refusal({"bench", folder, "--batch", "1,,8"}), "--batch: ''"));
  CHECK(holds(refusal({"bench", folder, "--batch", "0"}), "--batch: '0'"));
  CHECK(holds(refusal({"bench", folder, "--batch", "2000"}), "--batch: 2000 is too much"));
  CHECK(holds(refusal({"bench", folder, "--batch", "8,1,8"}), "--batch: 8 is there twice"));
  CHECK(holds(refusal({"bench", folder, "--samples", "8,,1"}), "--samples: ''"));
  CHECK(holds(refusal({"bench", folder, "--samples", "0"}), "--samples: '0'"));
  CHECK(holds(refusal({"bench", folder, "--samples", "1025"}), "--samples: 1025 is too much"));
  CHECK(holds(refusal({"bench", folder, "--samples", "64,64"}), "--samples: 64 is there twice"));
  CHECK(holds(refusal({"bench", folder, "--repeats", "0"}), "--repeats: '0'"));
  CHECK(holds(refusal({"bench", folder, "--repeats", "1001"}), "--repeats: at most 1000"));
  CHECK(holds(refusal({"bench", folder, "--prompt-tokens", "x"}), "--prompt-tokens: 'x'"));
  CHECK(holds(refusal({"bench", folder, "--prompt-tokens", "301"}), "more than the 400 tokens"));
  CHECK(holds(refusal({"bench", folder, "--prompt-tokens", "9223372036854775807"}), "more than the 400 tokens"));
  CHECK(holds(refusal({"bench", folder, "--decode-tokens", "400"}), "more than the 400 tokens"));
  CHECK(holds(refusal({"bench", folder, "--contexts", "100,400"}), "--contexts: 400 and a new token"));
  CHECK(holds(refusal({"bench", folder, "--matmul-gflops", "-1"}), "--matmul-gflops must be above 0"));
  CHECK(holds(refusal({"bench", folder, "--matmul-gflops", "inf"}), "--matmul-gflops: 'inf'"));
  const FakeBundle no_weights;  // the text in the place of a file of weights
  CHECK(holds(refusal({"bench", no_weights.path().string()}), "weights.safetensors"));
  const BenchBundle failing(json{{"fail_at_step", 1}});
  CHECK(run_program({"bench", failing.path().string()}).exit_code != 0);
}

TEST_CASE("bench: a start that fails is told by its own line") {
  const BenchBundle bundle;
  write_file(bundle / "weights.safetensors",
             std::string(std::filesystem::file_size(bundle / "weights.safetensors"), 'x'));
  // of the right size and not of the right content, which only opening the bundle finds
  const std::string message = refusal({"bench", bundle.path().string()});
  CHECK_MESSAGE(holds(message, "weights.safetensors"), message);
}

TEST_CASE("bench ends at once on Ctrl-C, with one line and no half of a report") {
  const BenchBundle bundle(json{{"step_ms", 50}});
  check_ends_at_once({"bench", bundle.path().string()});
}
