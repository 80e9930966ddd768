#include "options.h"

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>
#include <sstream>

#include "nanochat_x/error.h"
#include "nanochat_x/utf8.h"

namespace nanochat_x::app {
namespace {

constexpr std::uint64_t kLargest = std::numeric_limits<std::int64_t>::max();

std::string_view stripped(std::string_view text) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  return text;
}

// Decimal digits alone. CLI11's own conversion takes hexadecimal, octal, an empty text for 0, and the nearest number
// for what is too large.
std::optional<std::uint64_t> as_integer(std::string_view text, std::uint64_t low, std::uint64_t high) {
  std::uint64_t value = 0;
  const auto [stop, code] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || code != std::errc() || stop != text.data() + text.size()) return std::nullopt;
  if (value < low || value > high) return std::nullopt;
  return value;
}

// A decimal number that is finite; never hexadecimal, "inf" or "nan".
std::optional<double> as_number(const std::string& text) {
  if (text.empty() || text.find_first_not_of("0123456789+-.eE") != std::string::npos) return std::nullopt;
  char* stop = nullptr;
  const double value = std::strtod(text.c_str(), &stop);  // '.' is the point: no locale is ever set here
  if (stop != text.c_str() + text.size() || !std::isfinite(value)) return std::nullopt;
  return value;
}

[[noreturn]] void refuse(const std::string& names, const std::string& text, const std::string& wanted) {
  const std::string name = names.substr(names.find("--"));
  throw Error(name + ": '" + replace_invalid_utf8(text) + "' is not " + wanted);
}

template <typename Integer>
CLI::Option* add_integer(CLI::App& verb, const std::string& names, Integer& value, std::uint64_t low,
                         std::uint64_t high, const char* help) {
  return verb
      .add_option_function<std::string>(
          names,
          [&value, names, low, high](const std::string& text) {
            const auto given = as_integer(stripped(text), low, high);
            if (!given) {
              refuse(names, text,
                     "an integer of at least " + std::to_string(low) + " and at most " + std::to_string(high));
            }
            value = static_cast<Integer>(*given);
          },
          help)
      ->type_name("INT")
      ->default_str(std::to_string(value));
}

}  // namespace

CLI::Option* add_count(CLI::App& verb, const std::string& names, std::int64_t& value, std::int64_t least,
                       const char* help) {
  return add_integer(verb, names, value, static_cast<std::uint64_t>(least), kLargest, help);
}

void add_number(CLI::App& verb, const std::string& names, double& value, const char* help) {
  std::ostringstream shown;
  shown << value;
  verb.add_option_function<std::string>(
          names,
          [&value, names](const std::string& text) {
            const auto given = as_number(std::string(stripped(text)));
            if (!given) refuse(names, text, "a number");
            value = *given;
          },
          help)
      ->type_name("FLOAT")
      ->default_str(shown.str());
}

void add_model_options(CLI::App& verb, ModelOptions& options) {
  verb.add_option("BUNDLE", options.bundle, "Folder that `nanochat_x lower` wrote")->required();
  add_integer(verb, "--threads", options.backend.threads, 0, 4096,
              "CPU threads; 0: as many as the runtime takes by itself");
  verb.add_option("--device", options.backend.device, "Where to compute: cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
}

void add_sampling_options(CLI::App& verb, GenerateOptions& options) {
  SamplingParams& sampling = options.sampling;
  add_integer(verb, "-m,--max-tokens", options.max_tokens, 1, kLargest, "New tokens at most");
  add_number(verb, "-t,--temperature", sampling.temperature, "0: always the most likely token");
  add_integer(verb, "-k,--top-k", sampling.top_k, 0, kLargest, "Draw from the K most likely tokens; 0: from all");
  add_number(verb, "--top-p", sampling.top_p, "Then from the fewest that reach this probability together");
  add_integer(verb, "--seed", sampling.seed, 0, std::numeric_limits<std::uint64_t>::max(),
              "The same seed draws the same tokens");
}

void add_num_samples(CLI::App& verb, GenerateOptions& options) {
  add_integer(verb, "-n,--num-samples", options.num_samples, 1, kLargest, "Continuations of the one prompt");
}

void add_context(CLI::App& verb, std::int64_t& context) {
  add_integer(verb, "--context", context, 0, kLargest,
              "Predicted tokens of one window at most; 0: what the model was trained on, if the bundle takes so many");
}

std::vector<std::int64_t> parse_integers(std::string_view text, const std::string& option, std::int64_t least) {
  std::vector<std::int64_t> result;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string_view part = stripped(text.substr(begin, end - begin));
    const auto value = as_integer(part, static_cast<std::uint64_t>(least), kLargest);
    if (!value) {
      throw Error(option + ": '" + replace_invalid_utf8(part) + "' is not an integer of at least " +
                  std::to_string(least) + "; give a list such as 1,2,3");
    }
    result.push_back(static_cast<std::int64_t>(*value));
    begin = end + 1;
  }
  return result;
}

void check_utf8(std::string_view text, const std::string& what) {
  if (!is_valid_utf8(text)) throw Error(what + " is not valid UTF-8; the tokenizer takes UTF-8 text alone");
}

}  // namespace nanochat_x::app
