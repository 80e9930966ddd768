#pragma once

#include <bit>
#include <cstdint>

namespace nanochat_x::kernels {

/// A bfloat16 is the upper half of a float32.
inline float float_of(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

}  // namespace nanochat_x::kernels
