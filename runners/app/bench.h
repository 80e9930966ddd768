#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "model_work.h"
#include "nanochat_x/nanochat.h"
#include "options.h"

// `bench`: what is to be measured, what was, and the report on it (docs/bench.md).

namespace nanochat_x::app {

/// What is to be measured, checked against the bundle.
struct BenchPlan {
  ModelOptions model;
  int threads = 1;
  std::int64_t prompt_tokens = 0, decode_tokens = 0;
  std::int64_t repeats = 1;
  std::vector<std::int64_t> rows;      ///< of each batch
  std::vector<std::int64_t> samples;   ///< rows that continue one prompt, of each such batch
  std::vector<std::int64_t> contexts;  ///< tokens in the cache before the first step of decoding
  std::size_t read_bytes = 0;          ///< of the array that tells the memory's speed; 0: MemorySpeed's own choice
  std::optional<double> matmul_flops;  ///< a second, of a float32 matrix product; measured by the caller

  /// Steps of decoding at a context: fewer where the bundle takes no more positions.
  std::int64_t tokens_at(std::int64_t context, std::int64_t max_seq_len) const {
    return std::min(decode_tokens, max_seq_len - context);
  }
};

/// One start of the program: all that lies between the shell and the first token.
struct Start {
  double load_s = 0;         ///< opening the bundle: hashes, programs, weights
  double first_token_s = 0;  ///< from the start of the process
  std::optional<std::uint64_t> peak_bytes;
};

struct BatchTimes {
  std::int64_t rows = 0;
  std::vector<double> prefill_s, decode_s;  ///< of each repeat
};
struct SamplesTimes {
  std::int64_t rows = 0;
  std::vector<double> decode_s;
};
struct ContextTimes {
  std::int64_t context = 0, tokens = 0;
  std::vector<double> decode_s;
};

struct Measured {
  std::vector<Start> starts;        ///< with the whole prompt; none where a program cannot be started anew
  std::vector<Start> short_starts;  ///< with a prompt of one token
  std::optional<Start> whole;       ///< prompt and decoding: its peak is the runner's
  std::vector<BatchTimes> batches;
  std::vector<SamplesTimes> samples;
  std::vector<ContextTimes> contexts;
  std::vector<double> read_bytes_per_s;  ///< of this machine's memory, taken between the rounds
};

/// One start, in this process: prefill of `prompt_tokens`, then `decode_tokens` - 1 steps.
Start start_once(const ModelOptions& model, std::int64_t prompt_tokens, std::int64_t decode_tokens);

/// A round of the first batch for each line of standard input, answered by {"prefill_s", "decode_s"}; a first line of
/// JSON tells that all is loaded and warm. So another program measures in turns what it compares (bench/peers.py).
void serve(const BenchPlan& plan);

/// Measures by the plan: starts first, each a process of its own, then rounds in which every batch, all samples, every
/// context and the memory have their turn. Throws Error for what a step or a start throws.
Measured measure(const BenchPlan& plan);

/// The figures, with the keys of docs/bench.md.
nlohmann::ordered_json report_of(const BenchPlan& plan, const Manifest& manifest, const internal::ModelWork& work,
                                 const Measured& measured);
/// The same as lines for people.
std::string as_text(const nlohmann::ordered_json& report);

}  // namespace nanochat_x::app
