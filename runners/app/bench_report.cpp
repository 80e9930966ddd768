#include <algorithm>
#include <cstdio>
#include <string>

#include "bench.h"
#include "nanochat_x/backend.h"
#include "spread.h"
#include "text.h"

namespace nanochat_x::app {
namespace {

using nlohmann::ordered_json;

// Of what is above it, a limit was measured while the machine did something else, or does not limit at all.
constexpr double kAbove = 1.2;

ordered_json as_json(const internal::Spread& spread) {
  return {{"median", spread.median}, {"min", spread.min}, {"max", spread.max}};
}

// What `count` things in each of these times make a second.
internal::Spread rate_of(double count, const std::vector<double>& seconds) {
  std::vector<double> rates;
  for (const double time : seconds) rates.push_back(count / std::max(time, 1e-9));
  return internal::spread_of(rates);
}

ordered_json start_json(const std::vector<Start>& starts, double Start::* value) {
  if (starts.empty()) return {};
  std::vector<double> values;
  for (const Start& start : starts) values.push_back(start.*value);
  return as_json(internal::spread_of(values));
}

// `rate` beside the rate that a limit allows; nothing where there is none.
ordered_json limit_json(const internal::Spread& rate, std::optional<double> limit) {
  if (!limit) return {{"tokens_per_s", {}}, {"share", {}}, {"above", false}};
  const double share = rate.median / *limit;
  return {{"tokens_per_s", *limit}, {"share", share}, {"above", share > kAbove}};
}

ordered_json memory_json(const BenchPlan& plan, const internal::ModelWork& work, const Measured& measured) {
  const std::uint64_t cache = work.cache_bytes(1, plan.prompt_tokens + plan.decode_tokens);
  ordered_json peak, ratio;
  if (measured.whole && measured.whole->peak_bytes) {
    peak = *measured.whole->peak_bytes;
    ratio = static_cast<double>(*measured.whole->peak_bytes) / static_cast<double>(work.weights_bytes + cache);
  }
  return {{"peak_bytes", peak}, {"weights_bytes", work.weights_bytes}, {"cache_bytes", cache}, {"ratio", ratio}};
}

// One line of the table: `steps` times `rows` tokens in each of `seconds`.
ordered_json line_json(const char* what, std::int64_t rows, std::int64_t context, std::int64_t tokens,
                       const std::vector<double>& seconds, double work, std::optional<double> limit) {
  const internal::Spread rate = rate_of(static_cast<double>(rows * tokens), seconds);
  return {{"what", what},
          {"rows", rows},
          {"context", context},
          {"tokens", tokens},
          {"seconds", seconds},
          {"tokens_per_s", as_json(rate)},
          {what == std::string("prefill") ? "operations" : "bytes_per_step", work},
          {"limit", limit_json(rate, limit)}};
}

class Report {
 public:
  Report(const BenchPlan& plan, const Manifest& manifest, const internal::ModelWork& work, const Measured& measured)
      : plan_(&plan),
        manifest_(&manifest),
        work_(&work),
        measured_(&measured),
        read_(internal::spread_of(measured.read_bytes_per_s)) {}

  ordered_json json() const {
    const Measured& m = *measured_;
    ordered_json lines = ordered_json::array();
    for (const BatchTimes& batch : m.batches) {
      lines.push_back(prefill(batch));
      lines.push_back(decode(batch.rows, plan_->prompt_tokens, plan_->decode_tokens, batch.decode_s));
    }
    for (const SamplesTimes& samples : m.samples) lines.push_back(continued(samples));
    for (const ContextTimes& context : m.contexts) {
      lines.push_back(decode(1, context.context, context.tokens, context.decode_s));
    }
    return {{"bundle", internal::display(plan_->model.bundle)},
            {"target", manifest_->target},
            {"runtime", backend_version()},
            {"dtype", manifest_->dtype},
            {"threads", plan_->threads},
            {"prompt_tokens", plan_->prompt_tokens},
            {"decode_tokens", plan_->decode_tokens},
            {"repeats", plan_->repeats},
            {"start",
             {{"load_s", start_json(m.starts, &Start::load_s)},
              {"first_token_s", start_json(m.starts, &Start::first_token_s)},
              {"first_token_of_1_s", start_json(m.short_starts, &Start::first_token_s)}}},
            {"memory", memory_json(*plan_, *work_, m)},
            {"limits",
             {{"read_bytes_per_s", as_json(read_)},
              {"matmul_flops_per_s", plan_->matmul_flops ? ordered_json(*plan_->matmul_flops) : ordered_json()}}},
            {"lines", lines}};
  }

 private:
  ordered_json prefill(const BatchTimes& batch) const {
    const double operations = work_->prefill_operations(batch.rows, plan_->prompt_tokens);
    std::optional<double> limit;
    if (plan_->matmul_flops) {
      limit = *plan_->matmul_flops * static_cast<double>(batch.rows * plan_->prompt_tokens) / operations;
    }
    return line_json("prefill", batch.rows, 0, plan_->prompt_tokens, batch.prefill_s, operations, limit);
  }

  ordered_json decode(std::int64_t rows, std::int64_t context, std::int64_t tokens,
                      const std::vector<double>& seconds) const {
    return steps("decode", rows, context, tokens, seconds, work_->decode_bytes(rows, context, tokens));
  }
  ordered_json continued(const SamplesTimes& samples) const {
    const std::int64_t prompt = plan_->prompt_tokens, tokens = plan_->decode_tokens;
    return steps("samples", samples.rows, prompt, tokens, samples.decode_s,
                 work_->samples_bytes(samples.rows, prompt, tokens));
  }
  ordered_json steps(const char* what, std::int64_t rows, std::int64_t context, std::int64_t tokens,
                     const std::vector<double>& seconds, double bytes) const {
    std::optional<double> limit;
    // Without a cache every step computes the whole text: what it reads is not what holds it up.
    if (manifest_->is_cached()) limit = read_.max * static_cast<double>(rows) / bytes;
    return line_json(what, rows, context, tokens, seconds, bytes, limit);
  }

  const BenchPlan* plan_;
  const Manifest* manifest_;
  const internal::ModelWork* work_;
  const Measured* measured_;
  internal::Spread read_;
};

template <typename... Values>
std::string formatted(const char* format, Values... values) {
  char text[200];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

std::string spread_text(const ordered_json& spread, int digits, const char* unit) {
  if (spread.is_null()) return "not measured here";
  return formatted("%.*f%s (%.*f to %.*f)", digits, spread["median"].get<double>(), unit, digits,
                   spread["min"].get<double>(), digits, spread["max"].get<double>());
}

std::string memory_text(const ordered_json& memory) {
  const double weights = memory["weights_bytes"].get<double>() / 1e6, cache = memory["cache_bytes"].get<double>() / 1e6;
  const std::string parts = formatted("weights %.1f MB, cache %.1f MB", weights, cache);
  if (memory["peak_bytes"].is_null()) return parts + "; the peak was not measured here";
  return formatted("peak %.1f MB, %.2f times weights and cache (", memory["peak_bytes"].get<double>() / 1e6,
                   memory["ratio"].get<double>()) +
         parts + ")";
}

std::string row_text(const ordered_json& line) {
  const ordered_json& limit = line["limit"];
  const auto context = line["context"].get<std::int64_t>(), tokens = line["tokens"].get<std::int64_t>();
  const std::string span = std::to_string(context) + ".." + std::to_string(context + tokens);
  std::string text = formatted("%5lld  %-8s %10s %26s", static_cast<long long>(line["rows"].get<std::int64_t>()),
                               line["what"].get<std::string>().c_str(), span.c_str(),
                               spread_text(line["tokens_per_s"], 1, "").c_str());
  if (limit["share"].is_null()) return text + "         -       -";
  return text + formatted(" %9.1f  %4.0f %%%s", limit["tokens_per_s"].get<double>(), 100 * limit["share"].get<double>(),
                          limit["above"].get<bool>() ? " !" : "");
}

}  // namespace

ordered_json report_of(const BenchPlan& plan, const Manifest& manifest, const internal::ModelWork& work,
                       const Measured& measured) {
  return Report(plan, manifest, work, measured).json();
}

std::string as_text(const ordered_json& report) {
  const ordered_json& start = report["start"];
  const std::string prompt = report["prompt_tokens"].dump();
  std::string text;
  text += "bundle       " + report["bundle"].get<std::string>() + ": " + report["target"].get<std::string>() + ", " +
          report["dtype"].get<std::string>() + "\n";
  text += "machine      " + report["threads"].dump() + " threads read " +
          formatted("%.1f GB/s at best, %.1f in the middle",
                    report["limits"]["read_bytes_per_s"]["max"].get<double>() / 1e9,
                    report["limits"]["read_bytes_per_s"]["median"].get<double>() / 1e9);
  if (const auto& flops = report["limits"]["matmul_flops_per_s"]; !flops.is_null()) {
    text += formatted("; float32 matrix product %.1f GFLOP/s", flops.get<double>() / 1e9);
  }
  text += "\nload         " + spread_text(start["load_s"], 2, " s") + "\n";
  text += "first token  " + spread_text(start["first_token_s"], 2, " s") + " after a prompt of " + prompt + ", " +
          spread_text(start["first_token_of_1_s"], 2, " s") + " after 1\n";
  text += "memory       " + memory_text(report["memory"]) + "\n\n";
  text += " rows  what        context          tokens/s (spread)     limit   share\n";
  bool above = false;
  for (const ordered_json& line : report["lines"]) {
    text += row_text(line) + "\n";
    above = above || line["limit"]["above"].get<bool>();
  }
  if (above) {
    text +=
        "! far above its limit: the weights fit into a cache, 16 bits multiply faster, or the machine was busy when "
        "the limit was measured\n";
  }
  return text;
}

}  // namespace nanochat_x::app
