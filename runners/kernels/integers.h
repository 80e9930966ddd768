#pragma once

#include <cstdint>

#include "kernels.h"

namespace nanochat_x::kernels {

/// Rows of a matrix of quantised weights, as `linear_int8` and `linear_int4` take them. Of int8 there are no zeros.
struct QuantizedWeights {
  const std::uint8_t* q;
  const std::uint16_t* scales;
  const std::uint8_t* zeros;
};

/// The products of each layout of x, and whether there are any in such groups: of words with weights of `bits` and the
/// instructions chosen, of bytes with both.
bool takes_words(int bits, std::int64_t group);
void product_of_words(const QuantizedRow& x, const QuantizedWeights& w, float* y, std::int64_t begin, std::int64_t end);

bool takes_bytes(std::int64_t group);
void product_of_bytes(const QuantizedRow& x, const QuantizedWeights& w, float* y, std::int64_t begin, std::int64_t end);

/// Weights of a group that a product of integers takes: a lane sums no more products than that, and int32 holds 512 of
/// the largest.
inline constexpr std::int64_t kLargestGroup = 512;

/// x [K] in integers, with a scale a group, and what the integers' sum stands for. False if a value is NaN or infinite.
bool integers_of(const float* x, std::int64_t K, std::int64_t group, std::int16_t* q, float* scales, float* sums);

/// The integers of x as `product_of_bytes` reads them.
std::vector<QuantizedRow::Line> lines_of(const std::int16_t* q, std::int64_t K, std::int64_t group, int bits);

}  // namespace nanochat_x::kernels
