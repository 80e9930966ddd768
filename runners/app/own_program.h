#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// This program as others see it: started anew, and its memory.

namespace nanochat_x::app {

/// What a program printed until it ended.
struct Finished {
  std::string out, err;
  int exit_code = -1;  ///< 128 + the signal's number if one ended it
};
/// Runs this program once more, with nothing at its standard input. Nothing where that cannot be done (Windows). Throws
/// Error if it cannot be started.
std::optional<Finished> run_self(const std::vector<std::string>& arguments);

/// The most physical memory that this process has had, mapped files included as far as they were read; nothing where
/// the system does not tell (Windows).
std::optional<std::uint64_t> peak_memory_bytes();

}  // namespace nanochat_x::app
