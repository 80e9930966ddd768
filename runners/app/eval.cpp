#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <numbers>
#include <optional>

#include "nanochat_x/error.h"
#include "nanochat_x/nanochat.h"
#include "options.h"
#include "process.h"
#include "progress_line.h"
#include "text.h"
#include "windows.h"

// Bits per byte by nanochat's formula: the cross-entropy, in nats, of the predicted tokens that have bytes, over ln 2
// times the sum of those bytes. Special tokens have none and are left out of both sums.

namespace nanochat_x::app {
namespace {

using nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

// Of one step: its logits take vocab times as many floats.
constexpr std::int64_t kPiece = 128;

struct EvalCommand {
  ModelOptions model;
  TextOptions text;
  bool json = false;
};

struct Score {
  double nats = 0;
  std::int64_t tokens = 0, bytes = 0;
};

// -log softmax(logits)[target], in double. Not finite if any logit is NaN or +inf.
double cross_entropy(std::span<const float> logits, TokenId target) {
  const double largest = *std::ranges::max_element(logits);
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - largest);
  return std::log(sum) + (largest - logits[static_cast<std::size_t>(target)]);
}

// Adds the windows' tokens one by one.
class Evaluation {
 public:
  Evaluation(NanoChat& model, const Texts& texts, const std::vector<Window>& windows)
      : model_(&model), texts_(&texts), windows_(&windows) {
    for (const Window& window : windows) total_ += std::ssize(window.ids) - 1;
  }

  // False if `interrupt` ended it.
  bool run(const std::atomic<bool>& interrupt) {
    const bool cached = model_->manifest().is_cached();
    Session session = model_->new_session();
    for (const Window& window : *windows_) {
      const std::int64_t length = std::ssize(window.ids) - 1;
      // Without a cache a piece would cost what the whole window costs, so all of it is one piece.
      const std::int64_t piece = cached ? kPiece : length;
      session.reset();
      for (std::int64_t begin = 0; begin < length; begin += piece) {
        if (interrupt) return false;
        show(window);
        const std::int64_t size = std::min(piece, length - begin);
        add(session.append(
                std::span(window.ids).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(size)), size),
            window, begin);
      }
    }
    return !interrupt;
  }

  const Score& score() const { return score_; }

 private:
  // The logits behind the tokens from `begin` on, each of which predicts the next.
  void add(const Logits& logits, const Window& window, std::int64_t begin) {
    for (std::int64_t t = 0; t < logits.length; ++t) {
      const TokenId target = window.ids[static_cast<std::size_t>(begin + t + 1)];
      ++done_;
      const std::int64_t bytes = model_->tokenizer().byte_count(target);
      if (bytes == 0) continue;
      const double nats = cross_entropy(logits.at(0, t), target);
      if (!std::isfinite(nats)) {
        throw Error("the model's logits are not finite after " + std::to_string(begin + t + 1) +
                    " tokens of document " + std::to_string(window.document + 1) + " of " + texts_->where +
                    "; lower the checkpoint in float32 and compare");
      }
      score_.nats += nats;
      score_.bytes += bytes;
      ++score_.tokens;
    }
  }

  void show(const Window& window) {
    if (!line_.is_due()) return;
    const std::chrono::duration<double> time = Clock::now() - start_;
    char text[160];
    std::snprintf(text, sizeof text, "%3.0f %%  document %s of %s, %s of %s tokens, %.0f tokens/s",
                  100.0 * static_cast<double>(done_) / static_cast<double>(total_),
                  std::to_string(window.document + 1).c_str(), std::to_string(texts_->documents.size()).c_str(),
                  std::to_string(done_).c_str(), std::to_string(total_).c_str(),
                  static_cast<double>(done_) / std::max(time.count(), 1e-9));
    line_.show(text);
  }

  NanoChat* model_;
  const Texts* texts_;
  const std::vector<Window>* windows_;
  Score score_;
  std::int64_t done_ = 0, total_ = 0;
  Clock::time_point start_ = Clock::now();
  ProgressLine line_;
};

// Nothing if a signal ended it; its line is off the terminal then.
std::optional<Score> evaluate(NanoChat& model, const Texts& texts, const std::vector<Window>& windows) {
  const CatchInterrupt interrupt(true);
  Evaluation evaluation(model, texts, windows);
  if (!evaluation.run(*interrupt.flag())) return std::nullopt;
  return evaluation.score();
}

ordered_json result_of(const Score& score, std::size_t documents, double seconds) {
  if (score.tokens == 0) throw Error("no predicted token has bytes, so there is nothing to measure by");
  const double mean = score.nats / static_cast<double>(score.tokens);
  const double perplexity = std::exp(mean);
  if (!std::isfinite(perplexity)) {
    throw Error("the mean of " + std::to_string(mean) + " nats a token is too much for a perplexity");
  }
  return {{"bits_per_byte", score.nats / (std::numbers::ln2 * static_cast<double>(score.bytes))},
          {"perplexity", perplexity},
          {"nats_per_token", mean},
          {"documents", documents},
          {"tokens", score.tokens},
          {"bytes", score.bytes},
          {"seconds", seconds},
          {"tokens_per_second", static_cast<double>(score.tokens) / seconds}};
}

std::string as_text(const ordered_json& result) {
  char text[512];
  std::snprintf(text, sizeof text,
                "bits per byte     %.6f\n"
                "perplexity        %.4f\n"
                "nats per token    %.6f\n"
                "documents         %s: %s tokens, %s bytes\n"
                "time              %.2f s, %.0f tokens/s\n",
                result["bits_per_byte"].get<double>(), result["perplexity"].get<double>(),
                result["nats_per_token"].get<double>(), result["documents"].dump().c_str(),
                result["tokens"].dump().c_str(), result["bytes"].dump().c_str(), result["seconds"].get<double>(),
                result["tokens_per_second"].get<double>());
  return text;
}

int run_eval(const EvalCommand& command) {
  const Texts texts = read_texts(command.text);  // before the model is loaded, which may take long
  NanoChat model(command.model.bundle, command.model.backend);
  if (!model.tokenizer().counts_bytes()) {
    throw Error(internal::display(command.model.bundle) +
                ": its tokenizer.json has no token_bytes, an older nanochat_x wrote it; lower the checkpoint again");
  }
  const std::int64_t context = context_of(command.text, model.manifest());
  const std::vector<Window> windows = windows_of(texts, model.tokenizer(), context);
  const auto start = Clock::now();
  const std::optional<Score> score = evaluate(model, texts, windows);
  if (!score) return tell_caught_signal();
  const std::chrono::duration<double> time = Clock::now() - start;
  const ordered_json result = result_of(*score, texts.documents.size(), std::max(time.count(), 1e-9));
  write_out(as_text(result));
  if (command.json) write_out(result.dump() + "\n");
  return 0;
}

}  // namespace

void add_eval(CLI::App& app, int& exit_code) {
  const auto command = std::make_shared<EvalCommand>();
  CLI::App* verb = app.add_subcommand("eval", "Bits per byte and perplexity of texts");
  add_model_options(*verb, command->model);
  add_text_options(*verb, command->text);
  verb->add_flag("--json", command->json, "The last line is one JSON object with the same figures");
  verb->callback([command, &exit_code] { exit_code = run_eval(*command); });
}

}  // namespace nanochat_x::app
