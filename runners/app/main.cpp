#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <system_error>

#include "nanochat_x/backend.h"
#include "nanochat_x/error.h"
#include "options.h"
#include "process.h"

#ifndef NANOCHAT_X_VERSION
#define NANOCHAT_X_VERSION "unknown"
#endif

namespace nanochat_x::app {
namespace {

constexpr int kExitBadInput = 2;
constexpr int kExitInternal = 1;

// Whatever a library below says, the user gets one line.
int fail(std::string message, int exit_code) {
  std::replace_if(message.begin(), message.end(), [](char c) { return c == '\n' || c == '\r'; }, ' ');
  while (!message.empty() && message.back() == ' ') message.pop_back();
  std::fprintf(stderr, "%s: error: %s\n", program_name().c_str(), message.c_str());
  return exit_code;
}

// What the command line lacks, and where to read more. CLI11 says only that a verb is required when it does not know
// one.
std::string usage_error(const CLI::App& app, const CLI::ParseError& error, int argc, char** argv) {
  const std::string first = argc > 1 ? argv[1] : "";
  if (!app.get_subcommands([&](const CLI::App* verb) { return verb->get_name() == first; }).empty()) {
    return std::string(error.what()) + " (see " + program_name() + " " + first + " --help)";
  }
  const std::string what = first.empty() || first.starts_with('-') ? error.what() : "there is no verb '" + first + "'";
  return what + "; the verbs are chat, generate, forward, eval, bench, tokenize, info and session (see " +
         program_name() + " --help)";
}

int run(int argc, char** argv) {
  CLI::App app("Runs a nanochat model that `nanochat_x lower` made into a bundle. No Python needed.", program_name());
  int exit_code = 0;
  app.set_version_flag("--version", program_name() + " " + NANOCHAT_X_VERSION + " (" + backend_name() + ", runtime " +
                                        backend_version() + ")");
  app.allow_windows_style_options(false);  // a text may begin with '/'
  app.require_subcommand(1);
  app.get_formatter()->column_width(36);
  add_chat(app, exit_code);
  add_generate(app, exit_code);
  add_forward(app, exit_code);
  add_eval(app, exit_code);
  add_bench(app, exit_code);
  add_tokenize(app, exit_code);
  add_info(app, exit_code);
  add_session(app, exit_code);
  app.footer("`" + program_name() + " VERB --help` tells a verb's options.");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help and --version
    return fail(usage_error(app, error, argc, argv), kExitBadInput);
  }
  return exit_code;
}

}  // namespace
}  // namespace nanochat_x::app

int main(int argc, char** argv) {
  using nanochat_x::app::fail;
  nanochat_x::app::reserve_standard_streams();
  nanochat_x::app::end_quietly_on_closed_pipe();
  nanochat_x::app::keep_freed_memory();
  nanochat_x::app::end_on_signals();
  try {
    return nanochat_x::app::run(argc, argv);
  } catch (const nanochat_x::Error& error) {
    return fail(error.what(), nanochat_x::app::kExitBadInput);
  } catch (const std::bad_alloc&) {
    return fail("not enough memory", nanochat_x::app::kExitBadInput);
  } catch (const std::system_error& error) {  // std::filesystem's too
    return fail(error.what(), nanochat_x::app::kExitBadInput);
  } catch (const std::exception& error) {
    return fail(std::string("internal error: ") + error.what(), nanochat_x::app::kExitInternal);
  }
}
