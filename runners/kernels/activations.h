#pragma once

#include <cstdint>

namespace nanochat_x::kernels {

/// The rows of x of a product, M of K values, and where y goes.
struct Activations {
  const float* x;
  std::int64_t x_stride, M, K;
  float* y;
  std::int64_t y_stride;
};

/// Where some rows of y go: M of them, y[m * stride + n], in place of what is there or added to it.
struct Output {
  float* y;
  std::int64_t stride, M;
  bool adds;
};

}  // namespace nanochat_x::kernels
