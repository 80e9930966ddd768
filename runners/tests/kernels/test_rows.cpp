// Elements of 16 bits from float32 and back. The functions of rows themselves: runners/tests/executorch, operators.
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "instruction_sets.h"
#include "rows.h"

using namespace nanochat_x::test;
namespace kernels = nanochat_x::kernels;
using kernels::Type;

namespace {

struct Layout {
  Type type;
  int significand, least, most;  // bits of it, and exponents of normal numbers
};

constexpr Layout kLayouts[] = {{Type::bfloat16, 8, -126, 127}, {Type::float16, 11, -14, 15}};

// x to the nearest number of the layout, ties to even, as float32.
float rounded(float x, const Layout& layout) {
  if (!std::isfinite(x) || x == 0) return x;
  const int exponent = std::max(std::ilogb(x), layout.least);
  const double unit = std::ldexp(1.0, exponent - layout.significand + 1);
  const double nearest = std::nearbyint(double{x} / unit) * unit;
  return std::abs(nearest) >= std::ldexp(1.0, layout.most + 1)
             ? std::copysign(std::numeric_limits<float>::infinity(), x)
             : static_cast<float>(nearest);
}

std::uint32_t bits(float x) { return std::bit_cast<std::uint32_t>(x); }

// Finite numbers of every exponent, halfway between two of the layouts and next to that; infinity.
std::vector<float> numbers() {
  std::vector<float> all = {std::numeric_limits<float>::infinity()};
  for (std::uint32_t exponent = 0; exponent < 255; ++exponent) {
    for (const std::uint32_t low : {0u, 1u, 0x7FFFu, 0x8000u, 0x8001u, 0x18000u, 0xFFFu, 0x1000u, 0x1001u, 0x3000u,
                                    0x400000u, 0x600000u, 0x7FFFFFu}) {
      all.push_back(std::bit_cast<float>(exponent << 23 | low));
    }
  }
  for (std::size_t i = 0, count = all.size(); i < count; ++i) all.push_back(-all[i]);
  return all;
}

}  // namespace

TEST_CASE("rows: from_float32 rounds to nearest, ties to even, and to_float32 gives it back") {
  with_each_instruction_set([] {
    const std::vector<float> x = numbers();
    const auto count = static_cast<std::int64_t>(x.size());
    for (const Layout& layout : kLayouts) {
      CAPTURE(static_cast<int>(layout.type));
      std::vector<std::uint16_t> stored(x.size() + 2, 0xABCD);
      kernels::from_float32(x.data(), count, layout.type, stored.data(), 1);
      CHECK(stored.front() == 0xABCD);
      CHECK(stored.back() == 0xABCD);
      std::vector<float> back(x.size());
      kernels::to_float32(stored.data(), layout.type, 1, count, back.data());
      std::int64_t wrong = 0;
      for (std::size_t i = 0; i < x.size(); ++i) {
        const float wanted = rounded(x[i], layout);
        if (layout.type == Type::float16 && std::isinf(wanted)) {  // Highway's plain float16 knows no infinity
          wrong += stored[i + 1] != (wanted > 0 ? 0x7C00 : 0xFC00);
        } else {
          wrong += bits(back[i]) != bits(wanted);
        }
      }
      CHECK(wrong == 0);
    }
  });
}

TEST_CASE("rows: NaN stays NaN in 16 bits") {
  with_each_instruction_set([] {
    for (const std::uint32_t pattern : {0x7F800001u, 0x7FFFFFFFu, 0x7FC00000u, 0xFF800001u, 0xFFFFFFFFu}) {
      const float nan = std::bit_cast<float>(pattern);
      std::uint16_t half = 0, brain = 0;
      kernels::from_float32(&nan, 1, Type::float16, &half, 0);
      kernels::from_float32(&nan, 1, Type::bfloat16, &brain, 0);
      CHECK((half & 0x7C00) == 0x7C00);
      CHECK((half & 0x3FF) != 0);
      CHECK((brain & 0x7F80) == 0x7F80);
      CHECK((brain & 0x7F) != 0);
    }
  });
}

TEST_CASE("rows: float32 stays what it is") {
  const float x[] = {1, -2, 3};
  float out[] = {0, 0, 0, 0};
  kernels::from_float32(x, 3, Type::float32, out, 1);
  CHECK(out[0] == 0);
  CHECK(out[3] == 3);
  kernels::to_float32(out, Type::float32, 2, 2, out);
  CHECK(out[0] == -2);
}
