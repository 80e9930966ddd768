#include "bench.h"

#include <algorithm>
#include <memory>
#include <string>
#include <thread>

#include "nanochat_x/error.h"
#include "process.h"

namespace nanochat_x::app {
namespace {

using nlohmann::ordered_json;

constexpr std::int64_t kPromptTokens = 512, kDecodeTokens = 128;
constexpr std::int64_t kMostRows = 1024, kMostRepeats = 1000,
                       kMostReadMb = 65536;  // a slip of the finger must not run for a week

struct BenchCommand {
  ModelOptions model;
  std::int64_t prompt_tokens = 0, decode_tokens = 0, repeats = 5, read_mb = 0;
  std::string batch = "1,8", samples, contexts;
  double matmul_gflops = 0;
  bool json = false, once = false, serve = false;
};

std::vector<std::int64_t> parse_list(const std::string& text, const std::string& option, std::int64_t most) {
  std::vector<std::int64_t> list = parse_integers(text, option, 1);
  for (std::size_t i = 0; i < list.size(); ++i) {
    if (list[i] > most) {
      throw Error(option + ": " + std::to_string(list[i]) + " is too much; at most " + std::to_string(most));
    }
    if (std::find(list.begin(), list.begin() + static_cast<std::ptrdiff_t>(i), list[i]) !=
        list.begin() + static_cast<std::ptrdiff_t>(i)) {
      throw Error(option + ": " + std::to_string(list[i]) + " is there twice; name each once");
    }
  }
  return list;
}

// All that needs no bundle.
BenchPlan plan_of(const BenchCommand& command) {
  BenchPlan plan;
  plan.model = command.model;
  plan.threads = command.model.backend.threads;
  if (plan.threads == 0) plan.threads = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  plan.model.backend.threads = plan.threads;
  plan.repeats = command.repeats;
  if (plan.repeats > kMostRepeats) throw Error("--repeats: at most " + std::to_string(kMostRepeats));
  plan.rows = parse_list(command.batch, "--batch", kMostRows);
  if (!command.samples.empty()) plan.samples = parse_list(command.samples, "--samples", kMostRows);
  if (!command.contexts.empty()) plan.contexts = parse_list(command.contexts, "--contexts", 0x7fffffff);
  if (command.read_mb > kMostReadMb) throw Error("--read-mb: at most " + std::to_string(kMostReadMb));
  plan.read_bytes = static_cast<std::size_t>(command.read_mb) << 20;
  if (command.matmul_gflops < 0) throw Error("--matmul-gflops must be above 0");
  if (command.matmul_gflops > 0) plan.matmul_flops = command.matmul_gflops * 1e9;
  return plan;
}

// Lengths: what was asked for, else what is usual as far as the bundle takes it.
void fit(BenchPlan& plan, const BenchCommand& command, std::int64_t max_seq_len) {
  const std::string remedy = " tokens that the bundle takes; choose less, or lower again with a larger --max-seq-len";
  plan.decode_tokens = command.decode_tokens;
  if (plan.decode_tokens == 0) plan.decode_tokens = std::clamp<std::int64_t>(max_seq_len / 4, 1, kDecodeTokens);
  plan.prompt_tokens = command.prompt_tokens;
  if (plan.prompt_tokens == 0) {
    plan.prompt_tokens =
        std::clamp<std::int64_t>(max_seq_len - std::min(plan.decode_tokens, max_seq_len), 1, kPromptTokens);
  }
  if (plan.prompt_tokens > max_seq_len || plan.decode_tokens > max_seq_len - plan.prompt_tokens) {
    throw Error("a prompt of " + std::to_string(plan.prompt_tokens) + " tokens and " +
                std::to_string(plan.decode_tokens) + " new ones are more than the " + std::to_string(max_seq_len) +
                remedy);
  }
  for (const std::int64_t context : plan.contexts) {
    if (context >= max_seq_len) {
      throw Error("--contexts: " + std::to_string(context) + " and a new token are more than the " +
                  std::to_string(max_seq_len) + remedy);
    }
  }
}

int run_once(const BenchCommand& command) {
  const Start start = start_once(command.model, std::max<std::int64_t>(command.prompt_tokens, 1),
                                 std::max<std::int64_t>(command.decode_tokens, 1));
  const ordered_json json = {{"load_s", start.load_s},
                             {"first_token_s", start.first_token_s},
                             {"peak_bytes", start.peak_bytes ? ordered_json(*start.peak_bytes) : ordered_json()}};
  write_out(json.dump() + "\n");
  return 0;
}

int run_bench(const BenchCommand& command) {
  if (command.once) return run_once(command);
  BenchPlan plan = plan_of(command);
  const Bundle bundle = Bundle::open(command.model.bundle);
  check_runnable(bundle);
  fit(plan, command, bundle.manifest().max_seq_len);
  if (command.serve) {
    serve(plan);
    return 0;
  }
  const internal::ModelWork work = internal::work_of(bundle);
  const Measured measured = measure(plan);
  const ordered_json report = report_of(plan, bundle.manifest(), work, measured);
  write_out(as_text(report));
  if (command.json) write_out(report.dump(-1, ' ', false, ordered_json::error_handler_t::replace) + "\n");
  return 0;
}

}  // namespace

void add_bench(CLI::App& app, int& exit_code) {
  const auto command = std::make_shared<BenchCommand>();
  CLI::App* verb = app.add_subcommand("bench", "How fast it runs here, beside what this machine allows");
  add_model_options(*verb, command->model);
  add_count(*verb, "--prompt-tokens", command->prompt_tokens, 0,
            "Tokens of the prompt; 0: 512, or fewer if the bundle takes fewer");
  add_count(*verb, "--decode-tokens", command->decode_tokens, 0,
            "New tokens of each row; 0: 128, or fewer if the bundle takes fewer");
  verb->add_option("--batch", command->batch, "Rows that are computed together: one or several numbers, as 1,8")
      ->capture_default_str();
  verb->add_option("--samples", command->samples,
                   "Decode, rows that continue one prompt, too: one or several numbers of them, as 8,64");
  verb->add_option("--contexts", command->contexts,
                   "Decode, one row, behind so many tokens too: one or several numbers, as 100,2000");
  add_count(*verb, "--repeats", command->repeats, 1, "How often each is measured; the median is told, and the ends");
  add_number(*verb, "--matmul-gflops", command->matmul_gflops,
             "Float32 matrix product of this machine in GFLOP/s, prefill's limit: `nanochat_x bench` measures it by "
             "PyTorch; 0: unknown");
  verb->add_flag("--json", command->json, "The last line is one JSON object with the same figures");
  add_count(*verb, "--read-mb", command->read_mb, 0, "Size of the array that tells the memory's speed")->group("");
  verb->add_flag("--once", command->once, "One start alone, as a line of JSON: what `bench` starts itself by")
      ->group("");
  verb->add_flag("--serve", command->serve, "A round for each line of standard input: for who compares")->group("");
  verb->callback([command, &exit_code] { exit_code = run_bench(*command); });
}

}  // namespace nanochat_x::app
