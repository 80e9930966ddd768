#include "options.h"

#include <charconv>

#include "nanochat_x/error.h"
#include "nanochat_x/utf8.h"

namespace nanochat_x::app {

void add_model_options(CLI::App& verb, ModelOptions& options) {
  verb.add_option("BUNDLE", options.bundle, "Folder that `nanochat_x lower` wrote")->required();
  verb.add_option("--threads", options.backend.threads, "CPU threads; 0: as many as the runtime takes by itself")
      ->check(CLI::Range(0, 4096).description(""))
      ->capture_default_str();
  verb.add_option("--device", options.backend.device, "Where to compute: cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
}

void add_sampling_options(CLI::App& verb, GenerateOptions& options) {
  const auto add = [&verb](const char* names, auto& value, const char* help) {
    return verb.add_option(names, value, help)->capture_default_str();
  };
  add("-m,--max-tokens", options.max_tokens, "New tokens at most");
  add("-t,--temperature", options.sampling.temperature, "0: always the most likely token");
  add("-k,--top-k", options.sampling.top_k, "Draw from the K most likely tokens; 0: from all");
  add("--top-p", options.sampling.top_p, "Then from the fewest that reach this probability together");
  add("--seed", options.sampling.seed, "The same seed draws the same tokens")
      ->check([](const std::string& text) -> std::string {  // CLI11 would take -1 for 2^64 - 1
        return text.starts_with('-') ? "--seed is an integer of at least 0; got " + text : "";
      });
}

std::vector<std::int64_t> parse_integers(std::string_view text, const std::string& option, std::int64_t least) {
  std::vector<std::int64_t> result;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    std::string_view part = text.substr(begin, end - begin);
    while (!part.empty() && part.front() == ' ') part.remove_prefix(1);
    while (!part.empty() && part.back() == ' ') part.remove_suffix(1);
    std::int64_t value = 0;
    const auto [stop, code] = std::from_chars(part.data(), part.data() + part.size(), value);
    if (code != std::errc() || stop != part.data() + part.size() || value < least) {
      throw Error(option + ": '" + replace_invalid_utf8(part) + "' is not an integer of at least " +
                  std::to_string(least) + "; give a list such as 1,2,3");
    }
    result.push_back(value);
    begin = end + 1;
  }
  return result;
}

void check_utf8(std::string_view text, const std::string& what) {
  if (!is_valid_utf8(text)) throw Error(what + " is not valid UTF-8; the tokenizer takes UTF-8 text alone");
}

}  // namespace nanochat_x::app
