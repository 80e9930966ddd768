#pragma once

#include <stdexcept>
#include <string>

namespace nanochat_x {

/// The one exception type of this library. `what()` is one line: what was wrong, where, what to do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace nanochat_x
