#pragma once

#include <algorithm>
#include <cstdint>

namespace nanochat_x::kernels {

/// Rows of `depth` weights that a thread is worth waking for, where a product is split between some: about 10 us of
/// reading them.
inline std::int64_t rows_of_a_thread(std::int64_t depth) {
  constexpr std::int64_t kWeights = 1 << 15;
  return std::max<std::int64_t>(1, kWeights / std::max<std::int64_t>(1, depth));
}

}  // namespace nanochat_x::kernels
