#include "nanochat_x/engine.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <optional>
#include <string>
#include <utility>

#include "checks.h"
#include "nanochat_x/calculator.h"
#include "nanochat_x/error.h"

namespace nanochat_x {
namespace {

constexpr std::int64_t kMostSamples = 65536;  // a slip of the finger must not fill the memory

using Clock = std::chrono::steady_clock;

double seconds(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double>(end - begin).count();
}

// One sample while it grows: nanochat's state machine of one row.
class Row {
 public:
  Row(const GenerateOptions& options, std::uint64_t index) : sampler_(options.sampling, index), raw_(options.raw) {}

  // The next token: a forced one if any waits, else one drawn from `logits`. Returns it, and whether it was drawn.
  std::pair<TokenId, bool> next(std::span<const float> logits, const Tokenizer& tokenizer) {
    const bool sampled = forced_.empty();
    const TokenId id = sampled ? sampler_.sample(logits) : forced_.front();
    if (!sampled) forced_.pop_front();
    sample_.ids.push_back(id);
    sample_.mask.push_back(sampled ? 1 : 0);
    if (!raw_) react(id, tokenizer);
    return {id, sampled};
  }

  void stop(StopReason reason) {
    if (!done_) sample_.stop = reason;
    done_ = true;
  }
  bool done() const { return done_; }
  Sample take() { return std::move(sample_); }

 private:
  // Stop tokens and the calculator. A token that opens a block inside a block begins the expression anew.
  void react(TokenId id, const Tokenizer& tokenizer) {
    const SpecialTokens& special = tokenizer.special();
    if (id == special.assistant_end || id == special.bos) stop(StopReason::stop_token);
    if (id == special.python_start) {
      in_python_ = true;
      expression_.clear();
    } else if (id == special.python_end && in_python_) {
      in_python_ = false;
      force_result(tokenizer);
      expression_.clear();
    } else if (in_python_) {
      expression_.push_back(id);
    }
  }

  void force_result(const Tokenizer& tokenizer) {
    if (expression_.empty()) return;
    const std::optional<std::string> result = calculate(tokenizer.decode(expression_));
    if (!result) return;
    forced_.push_back(tokenizer.special().output_start);
    for (const TokenId id : tokenizer.encode(*result)) forced_.push_back(id);
    forced_.push_back(tokenizer.special().output_end);
  }

  Sampler sampler_;
  bool raw_;
  Sample sample_;
  bool done_ = false;
  std::deque<TokenId> forced_;
  bool in_python_ = false;
  std::vector<TokenId> expression_;
};

void check(const std::vector<TokenId>& prompt, const GenerateOptions& options, const Manifest& manifest) {
  options.validate();
  if (prompt.empty()) throw Error("the prompt is empty: at least one token is needed to continue from");
  check_fits("prompt", std::ssize(prompt), manifest.max_seq_len);
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    check_id(prompt[i], manifest.vocab_size, [i] { return "position " + std::to_string(i) + " of the prompt"; });
  }
}

bool interrupted(const GenerateOptions& options) { return options.interrupt && options.interrupt->load(); }

// Feeds what the session lacks of the prompt. Returns the logits after its last token, or nothing if interrupted.
std::optional<Logits> prefill(Session& session, std::span<const TokenId> prompt, const GenerateOptions& options) {
  std::span<const TokenId> rest = prompt.subspan(static_cast<std::size_t>(session.position(0)));
  session.reserve(std::ssize(prompt));
  while (true) {
    if (interrupted(options)) return std::nullopt;
    const auto piece = rest.first(std::min(rest.size(), static_cast<std::size_t>(session.prefill_chunk())));
    Logits logits = session.prefill(piece, std::ssize(piece));
    rest = rest.subspan(piece.size());
    if (rest.empty()) return logits;
  }
}

// Draws and feeds until every row is done. `first` are the logits after the prompt, row 0 of them for every sample.
void decode(Session& session, std::vector<Row>& rows, Logits first, const GenerateOptions& options,
            const Tokenizer& tokenizer, const OnToken& on_token) {
  std::vector<std::size_t> active(rows.size());  // sample of each row of the session
  for (std::size_t i = 0; i < active.size(); ++i) active[i] = i;
  Logits logits = std::move(first);
  for (std::int64_t step = 1;; ++step) {
    std::vector<TokenId> fed;
    std::vector<std::int64_t> kept;  // rows of the session that go on
    std::vector<std::size_t> still_active;
    for (std::size_t r = 0; r < active.size(); ++r) {
      Row& row = rows[active[r]];
      const auto logits_row = step == 1 ? std::int64_t{0} : static_cast<std::int64_t>(r);
      const auto [id, sampled] = row.next(logits.at(logits_row, 0), tokenizer);
      if (on_token) on_token(static_cast<std::int64_t>(active[r]), id, sampled);
      if (step == options.max_tokens) row.stop(StopReason::max_tokens);
      if (session.position(0) == session.max_seq_len()) row.stop(StopReason::context);
      if (row.done()) continue;
      fed.push_back(id);
      kept.push_back(static_cast<std::int64_t>(r));
      still_active.push_back(active[r]);
    }
    if (kept.empty() || interrupted(options)) return;
    if (kept.size() < active.size()) session.select_rows(kept);
    active = std::move(still_active);
    logits = {};  // the memory of the last step's first
    logits = session.append(fed, 1);
  }
}

}  // namespace

void GenerateOptions::validate() const {
  sampling.validate();
  if (max_tokens < 0) {
    throw Error("max_tokens must be 0 or above; got " + std::to_string(max_tokens));
  }
  if (num_samples < 1) {
    throw Error("num_samples must be 1 or above; got " + std::to_string(num_samples));
  }
  if (num_samples > kMostSamples) {
    throw Error("num_samples must be at most " + std::to_string(kMostSamples) + "; got " + std::to_string(num_samples));
  }
}

const char* to_string(StopReason reason) {
  switch (reason) {
    case StopReason::stop_token:
      return "stop_token";
    case StopReason::max_tokens:
      return "max_tokens";
    case StopReason::context:
      return "context";
    case StopReason::interrupt:
      return "interrupt";
  }
  return "unknown";
}

Engine::Engine(Backend& backend, const Manifest& manifest, const Tokenizer& tokenizer)
    : backend_(&backend), manifest_(&manifest), tokenizer_(&tokenizer) {}

Session Engine::resume(const std::vector<TokenId>& prompt) {
  if (!session_) return Session(*backend_, *manifest_, 1);
  Session session = std::move(*session_);
  session_.reset();
  const auto held = session.tokens(0);
  const auto common = std::ranges::mismatch(held, prompt).in1 - held.begin();
  // the last token is always fed: its logits are what is wanted
  session.rollback(0, std::min<std::int64_t>(common, std::ssize(prompt) - 1));
  return session;
}

Generation Engine::generate(const std::vector<TokenId>& prompt, const GenerateOptions& options,
                            const OnToken& on_token) {
  check(prompt, options, *manifest_);
  std::vector<Row> rows;
  for (std::int64_t i = 0; i < options.num_samples; ++i) rows.emplace_back(options, static_cast<std::uint64_t>(i));
  Generation result;
  Timing& timing = result.timing;
  timing.prompt_tokens = std::ssize(prompt);
  if (options.max_tokens > 0) {
    Session session = resume(prompt);
    timing.reused_tokens = session.position(0);
    const auto begin = Clock::now();
    std::optional<Logits> first = prefill(session, prompt, options);
    const auto prefilled = Clock::now();
    if (first) {
      if (rows.size() > 1) session.select_rows(std::vector<std::int64_t>(rows.size(), 0));
      decode(session, rows, std::move(*first), options, *tokenizer_, on_token);
    }
    timing.prefill_s = seconds(begin, prefilled);
    timing.decode_s = seconds(prefilled, Clock::now());
    if (rows.size() == 1) session_ = std::move(session);
    for (Row& row : rows) row.stop(StopReason::interrupt);  // those that nothing else has stopped
  }
  std::int64_t first_tokens = 0;
  for (Row& row : rows) {
    result.samples.push_back(row.take());
    timing.new_tokens += std::ssize(result.samples.back().ids);
    if (!result.samples.back().ids.empty()) ++first_tokens;
  }
  if (timing.decode_s > 0)
    timing.tokens_per_s = static_cast<double>(timing.new_tokens - first_tokens) / timing.decode_s;
  return result;
}

}  // namespace nanochat_x
