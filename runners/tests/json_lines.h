#pragma once

#include <cstdio>
#include <exception>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "nanochat_x/error.h"

/// Answers each line of JSON on standard input with one on standard output; an Error becomes {"error": ...}.
/// `make` makes the object whose `answer(json)` does the work. Returns the program's exit code.
template <typename Make>
int serve_json_lines(const char* program, Make&& make) {
  try {
    auto driver = make();
    for (std::string line; std::getline(std::cin, line);) {
      nlohmann::json answer;
      try {
        answer = driver.answer(nlohmann::json::parse(line));
      } catch (const nanochat_x::Error& error) {
        answer = {{"error", error.what()}};
      }
      std::cout << answer.dump() << std::endl;
    }
  } catch (const std::exception& error) {  // what the tests should not have sent
    std::fprintf(stderr, "%s: %s\n", program, error.what());
    return 2;
  }
  return 0;
}
