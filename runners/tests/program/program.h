#pragma once

#include <doctest/doctest.h>

#include <chrono>
#include <csignal>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "fake_bundle.h"
#include "process.h"

namespace nanochat_x::test {

/// The command line of nanochat-fake.
inline std::vector<std::string> command(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), NANOCHAT_FAKE);
  return arguments;
}

inline Run run_program(const std::vector<std::string>& arguments, const std::string& input = "") {
  return run(command(arguments), input);
}

/// The message of a run that was refused: exit code 2, nothing on standard output, one line on standard error. "" where
/// any of that does not hold, which no assertion on a message accepts.
inline std::string refusal(const std::vector<std::string>& arguments) {
  const Run result = run_program(arguments);
  const std::string start = "nanochat-aoti: error: ";
  const bool one_line = result.err.find('\n') == result.err.size() - 1;
  if (result.exit_code != 2 || !result.out.empty() || !one_line || !result.err.starts_with(start)) return "";
  return result.err.substr(start.size(), result.err.size() - start.size() - 1);
}

inline bool holds(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

/// A long run that is told to stop after 400 ms ends at once: the signal's exit code, one line, nothing on standard
/// output.
inline void check_ends_at_once(const std::vector<std::string>& arguments) {
  for (const int signal : {SIGINT, SIGTERM}) {
    Process process(command(arguments));
    std::this_thread::sleep_for(std::chrono::milliseconds(400));
    process.send(signal);
    const Ended ended = process.finish();
    CHECK(ended.exit_code == 128 + signal);
    CHECK(process.out.empty());
    CHECK(process.err == (signal == SIGINT ? "nanochat-aoti: interrupted\n" : "nanochat-aoti: ended by SIGTERM\n"));
  }
}

inline nlohmann::json last_line_json(const std::string& out) {
  const std::size_t begin = out.rfind('\n', out.size() - 2);
  return nlohmann::json::parse(out.substr(begin == std::string::npos ? 0 : begin + 1));
}

}  // namespace nanochat_x::test
