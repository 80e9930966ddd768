#pragma once

#include <algorithm>
#include <cstdint>

#include "activations.h"
#include "thread_space.h"

namespace nanochat_x::kernels {

/// Rows of x as the products read them: for each vector's worth of columns those of all rows that are computed
/// together, one behind the other, so that all is read in order, from the begin of a cache line. Columns are filled up
/// to a multiple of two vectors with zeros, and rows to as many as there are tiles for.
class Packed {
 public:
  /// `together(M)`: the rows that M are filled up to, at most `most`.
  template <typename Together>
  Packed(const Activations& a, std::int64_t most, std::int64_t lanes, Together together)
      : columns_((a.K + 2 * lanes - 1) / (2 * lanes) * (2 * lanes)) {
    std::int64_t rows = 0;
    for (std::int64_t m = 0; m < a.M; m += most) rows += together(std::min(most, a.M - m));
    float* const x = thread_space<float, Space::work>(rows * columns_);
    x_ = x;
    for (std::int64_t m = 0; m < a.M; m += most) {
      const std::int64_t some = std::min(most, a.M - m);
      pack({a.x + m * a.x_stride, a.x_stride, some, a.K, nullptr, 0}, together(some), lanes, x + m * columns_);
    }
  }

  /// The rows from m on, a multiple of `most`.
  const float* from(std::int64_t m) const { return x_ + m * columns_; }

 private:
  void pack(const Activations& a, std::int64_t rows, std::int64_t lanes, float* to) const {
    for (std::int64_t m = 0; m < rows; ++m) {
      for (std::int64_t k = 0; k < columns_; k += lanes) {
        const std::int64_t count = m < a.M ? std::clamp<std::int64_t>(a.K - k, 0, lanes) : 0;
        float* at = to + (k * rows + m * lanes);
        std::fill(std::copy_n(a.x + m * a.x_stride + k, count, at), at + lanes, 0.0F);
      }
    }
  }

  std::int64_t columns_;
  const float* x_;
};

}  // namespace nanochat_x::kernels
