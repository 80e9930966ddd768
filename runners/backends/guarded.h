#pragma once

#include <exception>
#include <string>
#include <utility>

#include "nanochat_x/error.h"

namespace nanochat_x {

/// Runs a runtime's code; its exceptions become Error, saying `what`. Their first line is kept: libtorch's and
/// onnxruntime's go on with where in their own sources they were thrown.
template <typename Function>
auto guarded(const std::string& what, Function&& function) {
  try {
    return std::forward<Function>(function)();
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    const std::string whole = error.what();
    throw Error(what + ": " + whole.substr(0, whole.find('\n')));
  }
}

}  // namespace nanochat_x
