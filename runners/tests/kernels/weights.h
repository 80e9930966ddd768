#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace nanochat_x::test {

enum class Format { float32, bfloat16, float16, int8, int4 };

/// A matrix of weights as it is stored, and what it means, exactly. What is stored begins one element behind an
/// allocation and ends with it: nothing is aligned, and a sanitizer sees what is read too much.
struct Weights {
  Format format;
  std::int64_t N, K, group;
  std::vector<std::uint8_t> bytes;    // one element too many, at the begin
  std::vector<std::uint16_t> scales;  // as `bytes`
  std::vector<std::uint8_t> zeros;    // as `bytes`
  std::vector<double> exact;          // [N, K]

  const void* stored() const;
  void multiply(const float* x, std::int64_t M, float* y, std::int64_t y_stride, std::int64_t begin,
                std::int64_t end) const;
  // Of int8 and int4, as float32 and as bfloat16
  std::vector<float> widened(std::int64_t begin, std::int64_t end) const;
  std::vector<std::uint16_t> rounded(std::int64_t begin, std::int64_t end) const;
};

/// Random ones. `group` counts for int8 and int4.
Weights random_weights(Format format, std::int64_t N, std::int64_t K, std::int64_t group, std::uint32_t seed);

/// Uniform in [-1, 1).
std::vector<float> random_floats(std::size_t count, std::uint32_t seed);

/// The same, in groups that differ in size by much.
std::vector<float> uneven_floats(std::int64_t count, std::int64_t group, std::uint32_t seed);

inline constexpr double kUnit = 0x1p-24;  // unit roundoff of float32

/// How many of y [M, N] are further from the product in double of x [M, K] with w than `n` roundings of float32 allow.
///
/// The sum of n products in float32, in whatever order, is off by at most g * sum |x||w| with g = n u / (1 - n u)
/// (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 4.2 and 3.1).
std::int64_t wrong(const Weights& w, const std::vector<double>& x, std::int64_t M, const std::vector<float>& y,
                   std::int64_t n);

std::string name_of(Format format);
kernels::Type type_of(Format format);

/// Bits of 16-bit numbers, of either sign, normal and subnormal, none larger than 2 in magnitude; and their values.
std::uint16_t random_bits(Format format, std::uint32_t random);
double value_of(Format format, std::uint16_t bits);

}  // namespace nanochat_x::test
