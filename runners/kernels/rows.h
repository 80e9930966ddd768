#pragma once

#include <cstdint>

#include "kernels.h"

namespace nanochat_x::kernels {

/// What stands between a model's products: functions of rows of float32, each in one pass or two. A result may be
/// written over an argument of the same shape. No function starts threads.

/// out = x / sqrt(mean(x^2) + eps) * scale, of a row of `width` values, 1 or more.
void norm(const float* x, std::int64_t width, float eps, float scale, float* out);

/// out = a x + b y.
void mix(const float* x, float a, const float* y, float b, std::int64_t count, float* out);

/// Rotary position embedding of a row of 2 `half` values, whose halves are a and b: (a cos + b sin, b cos - a sin).
/// Here out must not be x.
void rotate(const float* x, const float* cos, const float* sin, std::int64_t half, float* out);

/// out = max(x, 0)^2; NaN stays NaN.
void relu_square(const float* x, std::int64_t count, float* out);

/// out = cap tanh(x / cap).
void soft_cap(const float* x, float cap, std::int64_t count, float* out);

/// Elements [first, first + count) of those at `from`, in float32.
void to_float32(const void* from, Type type, std::int64_t first, std::int64_t count, float* out);

/// Writes `count` values as elements of `to` from `first` on, rounded to nearest, ties to even. NaN stays NaN.
void from_float32(const float* x, std::int64_t count, Type type, void* to, std::int64_t first);

}  // namespace nanochat_x::kernels
