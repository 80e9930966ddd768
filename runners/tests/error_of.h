#pragma once

#include <string>

#include "nanochat_x/error.h"

namespace nanochat_x::test {

/// What `call` throws as Error; "" if it throws nothing (which no assertion on a message accepts). Any other exception
/// passes through and fails the test.
template <typename Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos && text.find('\n') == std::string::npos;
}

}  // namespace nanochat_x::test
