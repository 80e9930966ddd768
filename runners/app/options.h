#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "nanochat_x/engine.h"

// Command line options that several verbs share.

namespace nanochat_x::app {

struct ModelOptions {
  std::filesystem::path bundle;
  BackendOptions backend;
};

/// BUNDLE, --threads and --device.
void add_model_options(CLI::App& verb, ModelOptions& options);
/// --max-tokens, --temperature, --top-k, --top-p, --seed.
void add_sampling_options(CLI::App& verb, GenerateOptions& options);

/// --num-samples.
void add_num_samples(CLI::App& verb, GenerateOptions& options);
/// --context; 0, the default: the bundle's own.
void add_context(CLI::App& verb, std::int64_t& context);

/// An integer from `least` on; `value` is the default, and what is given in its place.
CLI::Option* add_count(CLI::App& verb, const std::string& names, std::int64_t& value, std::int64_t least,
                       const char* help);
/// A finite number; which ones make sense, its verb knows.
void add_number(CLI::App& verb, const std::string& names, double& value, const char* help);

/// "1,2,3" as integers, each at least `least` (0 or more). Throws Error naming `option`.
std::vector<std::int64_t> parse_integers(std::string_view text, const std::string& option, std::int64_t least);
/// Throws Error naming `what` if `text` is not UTF-8.
void check_utf8(std::string_view text, const std::string& what);

// The verbs: each adds its subcommand, which sets `exit_code` when it has run.
void add_forward(CLI::App& app, int& exit_code);
void add_eval(CLI::App& app, int& exit_code);
void add_tokenize(CLI::App& app, int& exit_code);
void add_generate(CLI::App& app, int& exit_code);
void add_chat(CLI::App& app, int& exit_code);
void add_info(CLI::App& app, int& exit_code);
void add_session(CLI::App& app, int& exit_code);
void add_bench(CLI::App& app, int& exit_code);

}  // namespace nanochat_x::app
