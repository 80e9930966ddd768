#pragma once

#include <cstdint>
#include <string>

#include "kernels.h"
#include "nanochat_x/error.h"

namespace nanochat_x::kernels {

inline void check_rows(std::int64_t begin, std::int64_t end) {
  if (begin < 0 || begin > end) {
    throw Error("rows of weights: from " + std::to_string(begin) + " to " + std::to_string(end) + " is no range");
  }
}

inline void check_width(std::int64_t K) {
  if (K < 1) throw Error("rows of weights must hold 1 value or more; got " + std::to_string(K));
}

inline void check_group(std::int64_t K, std::int64_t group) {
  if (group < 16 || group % 8 != 0 || K % group != 0) {
    throw Error("a group of quantised weights must be a multiple of 8, from 16 on, that divides the row; got " +
                std::to_string(group) + " of " + std::to_string(K));
  }
}

inline void check_batch(std::int64_t M) {
  if (M < 1 || M > kMostRows) {
    throw Error("a product takes 1 to " + std::to_string(kMostRows) + " rows at once; got " + std::to_string(M));
  }
}

}  // namespace nanochat_x::kernels
