#pragma once

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "nanochat_x/error.h"
#include "nanochat_x/utf8.h"

namespace nanochat_x::fuzz {

/// A promise of the library that some input made it break. Nothing catches it: the fuzzer takes it for a crash.
class Violation : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

inline void demand(bool kept, const std::string& promise) {
  if (!kept) throw Violation("broken promise: " + promise);
}

/// What `call` throws as Error, checked to be one line that a terminal can show; nothing if it returns. Whatever else
/// it throws is a Violation.
template <typename Call>
std::optional<std::string> refusal(Call&& call) {
  std::string message;
  try {
    call();
    return std::nullopt;
  } catch (const Violation&) {
    throw;
  } catch (const Error& error) {
    message = error.what();
  } catch (const std::exception& error) {
    throw Violation(std::string("broken promise: Error alone is thrown, not: ") + error.what());
  }
  demand(!message.empty(), "an error says something");
  demand(message.size() < 16384, "an error is no book");
  demand(is_valid_utf8(message), "an error is UTF-8");
  demand(std::ranges::none_of(message, [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }),
         "an error is one line, without control characters");
  return message;
}

}  // namespace nanochat_x::fuzz
