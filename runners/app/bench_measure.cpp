#include <chrono>
#include <deque>
#include <iostream>
#include <string>
#include <utility>

#include "bench.h"
#include "memory_speed.h"
#include "nanochat_x/error.h"
#include "own_program.h"
#include "process.h"
#include "progress_line.h"

namespace nanochat_x::app {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kWarmSteps = 4;  // of decoding, before anything counts

double since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// Any ids do: speed does not depend on them. No two rows are alike, and a table's rows are not read one after the
// other.
std::vector<std::int64_t> some_ids(std::int64_t count, std::int64_t vocab, std::int64_t seed) {
  std::vector<std::int64_t> ids;
  auto state = static_cast<std::uint64_t>(seed) * 0x9e3779b97f4a7c15U + 1;
  for (std::int64_t i = 0; i < count; ++i) {
    state = state * 6364136223846793005U + 1442695040888963407U;  // Knuth's MMIX
    ids.push_back(static_cast<std::int64_t>((state >> 33U) % static_cast<std::uint64_t>(vocab)));
  }
  return ids;
}

// A batch of rows that is filled and continued over and over.
class Batch {
 public:
  Batch(NanoChat& model, std::int64_t rows, std::int64_t capacity)
      : session_(model.new_session(rows)), rows_(rows), vocab_(model.manifest().vocab_size) {
    session_.reserve(capacity);
  }

  // Seconds until the logits behind `tokens` tokens of each empty row.
  double prefill(std::int64_t tokens) {
    session_.reset();
    const auto ids = some_ids(rows_ * tokens, vocab_, 1);
    const auto begin = Clock::now();
    (void)session_.prefill(ids, tokens);
    return since(begin);
  }

  // The one row becomes `rows` that continue it, as samples of one prompt do.
  void fork(std::int64_t rows) {
    session_.select_rows(std::vector<std::int64_t>(static_cast<std::size_t>(rows)));
    rows_ = rows;
  }

  // Seconds of `tokens` steps, one token a row each, behind what is there; they are taken back afterwards.
  double decode(std::int64_t tokens) {
    const std::int64_t before = session_.position(0);
    const auto ids = some_ids(rows_ * tokens, vocab_, 2);
    const auto begin = Clock::now();
    for (std::int64_t i = 0; i < tokens; ++i) {
      (void)session_.append(
          std::span(ids).subspan(static_cast<std::size_t>(i * rows_), static_cast<std::size_t>(rows_)), 1);
    }
    const double time = since(begin);
    for (std::int64_t row = 0; row < rows_; ++row) session_.rollback(row, before);
    return time;
  }

 private:
  Session session_;
  std::int64_t rows_, vocab_;
};

Start start_anew(const BenchPlan& plan, std::int64_t prompt_tokens, std::int64_t decode_tokens) {
  const auto finished = run_self({"bench", plan.model.bundle.string(), "--once", "--prompt-tokens",
                                  std::to_string(prompt_tokens), "--decode-tokens", std::to_string(decode_tokens),
                                  "--threads", std::to_string(plan.threads), "--device", plan.model.backend.device});
  if (!finished) return {};
  if (finished->exit_code != 0) {
    std::string why = finished->err;
    if (const auto prefix = why.find("error: "); prefix != why.npos) why.erase(0, prefix + 7);
    throw Error(why.empty() ? "a start of the program ended with code " + std::to_string(finished->exit_code) : why);
  }
  const auto json = nlohmann::json::parse(finished->out);
  Start start{.load_s = json.at("load_s"), .first_token_s = json.at("first_token_s"), .peak_bytes = {}};
  if (!json.at("peak_bytes").is_null()) start.peak_bytes = json.at("peak_bytes").get<std::uint64_t>();
  return start;
}

#ifdef _WIN32
constexpr bool kCanStart = false;
#else
constexpr bool kCanStart = true;
#endif

// Before anything is loaded here: the machine's memory is theirs.
void measure_starts(const BenchPlan& plan, ProgressLine& line, Measured& out) {
  if (!kCanStart) return;
  line.show("a whole run");
  out.whole = start_anew(plan, plan.prompt_tokens, plan.decode_tokens);  // the file cache is warm afterwards
  for (std::int64_t i = 0; i < plan.repeats; ++i) {
    line.show("start " + std::to_string(i + 1) + " of " + std::to_string(plan.repeats));
    out.starts.push_back(start_anew(plan, plan.prompt_tokens, 1));
    out.short_starts.push_back(start_anew(plan, 1, 1));
  }
}

void measure_rounds(const BenchPlan& plan, ProgressLine& line, Measured& out) {
  constexpr int kReadings = 3;  // of the memory in each round: others may use it at a time, and the best counts
  NanoChat model(plan.model.bundle, plan.model.backend);
  std::deque<Batch> batches, samples, contexts;
  for (const std::int64_t rows : plan.rows) {
    line.show("warm up, batch " + std::to_string(rows));
    Batch& batch = batches.emplace_back(model, rows, plan.prompt_tokens + plan.decode_tokens);
    (void)batch.prefill(plan.prompt_tokens);
    (void)batch.decode(std::min(kWarmSteps, plan.decode_tokens));
    out.batches.push_back({.rows = rows, .prefill_s = {}, .decode_s = {}});
  }
  for (const std::int64_t rows : plan.samples) {
    line.show("warm up, samples " + std::to_string(rows));
    Batch& batch = samples.emplace_back(model, 1, plan.prompt_tokens + plan.decode_tokens);
    (void)batch.prefill(plan.prompt_tokens);
    batch.fork(rows);
    (void)batch.decode(std::min(kWarmSteps, plan.decode_tokens));
    out.samples.push_back({.rows = rows, .decode_s = {}});
  }
  for (const std::int64_t context : plan.contexts) {
    line.show("warm up, context " + std::to_string(context));
    const std::int64_t tokens = plan.tokens_at(context, model.manifest().max_seq_len);
    Batch& batch = contexts.emplace_back(model, 1, context + tokens);
    (void)batch.prefill(context);
    (void)batch.decode(std::min(kWarmSteps, tokens));
    out.contexts.push_back({.context = context, .tokens = tokens, .decode_s = {}});
  }
  internal::MemorySpeed memory(plan.threads, plan.read_bytes);
  // In turns, so that what slows the machine down for a while slows all of them down.
  for (std::int64_t round = 0; round < plan.repeats; ++round) {
    const std::string where = "round " + std::to_string(round + 1) + " of " + std::to_string(plan.repeats);
    for (std::size_t i = 0; i < batches.size(); ++i) {
      line.show(where + ", batch " + std::to_string(plan.rows[i]));
      out.batches[i].prefill_s.push_back(batches[i].prefill(plan.prompt_tokens));
      out.batches[i].decode_s.push_back(batches[i].decode(plan.decode_tokens));
    }
    for (std::size_t i = 0; i < samples.size(); ++i) {
      line.show(where + ", samples " + std::to_string(plan.samples[i]));
      out.samples[i].decode_s.push_back(samples[i].decode(plan.decode_tokens));
    }
    for (std::size_t i = 0; i < contexts.size(); ++i) {
      line.show(where + ", context " + std::to_string(plan.contexts[i]));
      out.contexts[i].decode_s.push_back(contexts[i].decode(out.contexts[i].tokens));
    }
    for (int i = 0; i < kReadings; ++i) out.read_bytes_per_s.push_back(memory.measure());
  }
}

}  // namespace

Start start_once(const ModelOptions& options, std::int64_t prompt_tokens, std::int64_t decode_tokens) {
  Start start;
  const auto begin = Clock::now();
  NanoChat model(options.bundle, options.backend);
  start.load_s = since(begin);
  GenerateOptions generate;
  generate.max_tokens = decode_tokens;
  generate.sampling.temperature = 0;
  generate.raw = true;
  bool first = true;
  (void)model.engine().generate(some_ids(prompt_tokens, model.manifest().vocab_size, 1), generate,
                                [&](std::int64_t, TokenId, bool) {
                                  if (std::exchange(first, false)) start.first_token_s = seconds_since_process_start();
                                });
  start.peak_bytes = peak_memory_bytes();
  return start;
}

void serve(const BenchPlan& plan) {
  NanoChat model(plan.model.bundle, plan.model.backend);
  Batch batch(model, plan.rows.front(), plan.prompt_tokens + plan.decode_tokens);
  (void)batch.prefill(plan.prompt_tokens);
  (void)batch.decode(std::min(kWarmSteps, plan.decode_tokens));
  write_out("{\"ready\":true}\n");
  for (std::string line; std::getline(std::cin, line);) {
    const double prefill = batch.prefill(plan.prompt_tokens);
    const double decode = batch.decode(plan.decode_tokens);
    write_out(nlohmann::ordered_json{{"prefill_s", prefill}, {"decode_s", decode}}.dump() + "\n");
  }
}

Measured measure(const BenchPlan& plan) {
  Measured out;
  ProgressLine line;
  measure_starts(plan, line, out);
  measure_rounds(plan, line, out);
  return out;
}

}  // namespace nanochat_x::app
