#pragma once

#include <cstdint>
#include <string>

#include "kernels.h"
#include "nanochat_x/error.h"

namespace nanochat_x::kernels {

/// Of one row of w, the values that are not in its blocks.
struct Exceptions {
  std::int64_t begin, end;
};

/// Throws nanochat_x::Error where they are not within the matrix: a file's, they could be anything.
inline Exceptions exceptions_of(const Compact& w, std::int64_t row) {
  const Exceptions found{w.starts[row], w.starts[row + 1]};
  if (found.begin < 0 || found.begin > found.end || found.end > w.exceptions) {
    throw Error("a compact matrix: row " + std::to_string(row) + " has exceptions " + std::to_string(found.begin) +
                " to " + std::to_string(found.end) + " of " + std::to_string(w.exceptions));
  }
  return found;
}

/// The column of an exception. Throws nanochat_x::Error where there is none.
inline std::int64_t column_of(const Compact& w, std::int64_t exception) {
  const std::int64_t column = w.columns[exception];
  if (column < 0 || column >= w.K) {
    throw Error("a compact matrix: an exception in column " + std::to_string(column) + " of " + std::to_string(w.K));
  }
  return column;
}

inline void check_compact(const Compact& w) {
  if (w.K < 1 || w.K % kCompactBlock != 0) {
    throw Error("rows of a compact matrix hold a multiple of " + std::to_string(kCompactBlock) + " values; got " +
                std::to_string(w.K));
  }
}

}  // namespace nanochat_x::kernels
