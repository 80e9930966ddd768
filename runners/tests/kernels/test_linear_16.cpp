// Products whose x has 16 bits: integers with int8 and int4, bfloat16 with bfloat16.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "error_of.h"
#include "instruction_sets.h"
#include "kernels.h"
#include "weights.h"

using namespace nanochat_x::test;
namespace kernels = nanochat_x::kernels;

namespace {

constexpr double kUnit = 0x1p-24;  // unit roundoff of float32

struct Integers {
  std::vector<std::int16_t> q;
  std::vector<float> scales;
  bool finite;
  kernels::QuantizedRow row() const { return {q.data(), scales.data()}; }
};

Integers integers(const std::vector<float>& x, std::int64_t group) {
  const auto K = static_cast<std::int64_t>(x.size());
  Integers to{std::vector<std::int16_t>(x.size()), std::vector<float>(static_cast<std::size_t>(K / group)), false};
  to.finite = kernels::quantize_row(x.data(), K, group, to.q.data(), to.scales.data());
  return to;
}

/// x in groups that differ in size by much.
std::vector<float> uneven(std::int64_t K, std::int64_t group) {
  std::vector<float> x = random_floats(static_cast<std::size_t>(K), 21);
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] *= std::exp2(static_cast<float>(static_cast<std::int64_t>(i) / group % 9 - 4));
  }
  return x;
}

/// How many of y [N] are further from the product in double of w with `values` than `n` roundings of float32 allow (see
/// test_linear.cpp).
std::int64_t wrong(const Weights& w, const std::vector<double>& values, const std::vector<float>& y, std::int64_t n) {
  const double roundings = static_cast<double>(n), g = roundings * kUnit / (1 - roundings * kUnit);
  std::int64_t found = 0;
  for (std::int64_t row = 0; row < w.N; ++row) {
    double sum = 0, magnitudes = 0;
    for (std::int64_t k = 0; k < w.K; ++k) {
      const double product = values[static_cast<std::size_t>(k)] * w.exact[static_cast<std::size_t>(row * w.K + k)];
      sum += product;
      magnitudes += std::abs(product);
    }
    found += !(std::abs(y[static_cast<std::size_t>(row)] - sum) <= g * magnitudes);
  }
  return found;
}

std::vector<float> product(const Weights& w, const Integers& x, std::int64_t begin, std::int64_t end) {
  std::vector<float> y(static_cast<std::size_t>(w.N), 12345);
  const std::uint16_t* scales = w.scales.data() + 1;
  if (w.format == Format::int8) {
    const auto* q = static_cast<const std::int8_t*>(w.stored());
    kernels::linear_int8(x.row(), w.K, q, scales, w.group, y.data(), begin, end);
  } else {
    const auto* q = static_cast<const std::uint8_t*>(w.stored());
    kernels::linear_int4(x.row(), w.K, q, scales, w.zeros.data() + 1, w.group, y.data(), begin, end);
  }
  return y;
}

}  // namespace

TEST_CASE("a row in integers: every value within half a step, the largest exactly, zero as zero") {
  with_each_instruction_set([] {
    for (const std::int64_t group : {16, 32, 64, 96}) {
      CAPTURE(group);
      std::vector<float> x = uneven(4 * group, group);
      std::fill_n(x.begin() + 2 * group, group, 0.0F);
      const Integers to = integers(x, group);
      REQUIRE(to.finite);
      for (std::int64_t g = 0; g < 4; ++g) {
        double largest = 0;
        for (std::int64_t i = g * group; i < (g + 1) * group; ++i) {
          largest = std::max(largest, std::abs(double{x[static_cast<std::size_t>(i)]}));
        }
        std::int64_t far = 0;
        for (std::int64_t i = g * group; i < (g + 1) * group; ++i) {
          const auto at = static_cast<std::size_t>(i);
          const double distance =
              std::abs(static_cast<double>(to.q[at]) * to.scales[static_cast<std::size_t>(g)] - x[at]);
          // Half a step, and what float32 rounds in the scale, its inverse and their product with a value.
          far += !(distance <= largest * (0.5 / 32767 + 4 * kUnit));
        }
        CHECK(far == 0);
      }
      CHECK(std::all_of(to.q.begin() + 2 * group, to.q.begin() + 3 * group, [](auto q) { return q == 0; }));
      CHECK(*std::max_element(to.q.begin(), to.q.end(), [](int a, int b) { return std::abs(a) < std::abs(b); }) != 0);
    }
  });
}

TEST_CASE("a row in integers: neither NaN nor infinity is one") {
  with_each_instruction_set([] {
    for (const float odd : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity()}) {
      for (const std::size_t at : {0U, 17U, 63U}) {
        std::vector<float> x = random_floats(64, 22);
        REQUIRE(integers(x, 32).finite);
        x[at] = odd;
        CHECK(!integers(x, 32).finite);
      }
    }
    // The smallest and the largest numbers there are
    std::vector<float> x(32, std::numeric_limits<float>::denorm_min());
    CHECK(integers(x, 32).finite);
    x[3] = std::numeric_limits<float>::max();
    const Integers to = integers(x, 32);
    CHECK(to.finite);
    CHECK(to.q[3] == 32767);
    CHECK(to.q[4] == 0);
  });
}

TEST_CASE("integers with int8 and int4: the product of what they stand for") {
  with_each_instruction_set([] {
    std::int64_t taken = 0;
    for (const Format format : {Format::int8, Format::int4}) {
      for (const std::int64_t group : {16, 24, 32, 40, 64, 96, 128, 512}) {
        if (!kernels::takes_quantized_row(format == Format::int8 ? 8 : 4, group)) continue;
        ++taken;
        for (const std::int64_t groups : {1, 3, 24, 70}) {
          if (group * groups > 10'000) continue;
          CAPTURE(name_of(format));
          CAPTURE(group);
          CAPTURE(groups);
          const Weights w = random_weights(format, 13, group * groups, group, 23);
          const Integers x = integers(uneven(w.K, group), group);
          std::vector<double> values;
          for (std::size_t i = 0; i < x.q.size(); ++i) {
            values.push_back(static_cast<double>(x.q[i]) * x.scales[i / static_cast<std::size_t>(group)]);
          }
          // A group's sum becomes a float32 and is multiplied by a product of two scales; then groups and lanes are
          // added.
          const std::int64_t roundings = groups + 3 + 16;
          const std::vector<float> y = product(w, x, 0, w.N);
          CHECK(wrong(w, values, y, roundings) == 0);
          std::vector<double> other = values;
          other.back() += *std::max_element(values.begin(), values.end()) + 1;
          CHECK(wrong(w, other, y, roundings) > 0);
          const std::vector<float> part = product(w, x, 3, 10);
          CHECK(std::equal(part.begin() + 3, part.begin() + 10, y.begin() + 3));
          CHECK(part[2] == 12345);
          CHECK(part[10] == 12345);
        }
      }
    }
    CHECK(taken > 0);
  });
}

TEST_CASE("integers: the largest there are do not overflow") {
  with_each_instruction_set([] {
    for (const std::int64_t group : {32, 64, 512}) {
      if (!kernels::takes_quantized_row(8, group)) continue;
      CAPTURE(group);
      Weights w = random_weights(Format::int8, 4, group, group, 24);
      std::fill(w.bytes.begin() + 1, w.bytes.end(), std::uint8_t{128});  // -128
      std::fill(w.scales.begin() + 1, w.scales.end(), std::uint16_t{0x3f80});
      const Integers x = integers(std::vector<float>(static_cast<std::size_t>(group), -32767.0F), group);
      for (const float y : product(w, x, 0, 4)) CHECK(y == 128.0F * 32767 * static_cast<float>(group));
    }
  });
}

TEST_CASE("integers: groups that are not taken are refused") {
  CHECK(!kernels::takes_quantized_row(8, 4096));
  const Weights w = random_weights(Format::int8, 1, 4096, 4096, 25);
  const Integers x = integers(random_floats(4096, 26), 4096);
  CHECK(error_of([&] { (void)product(w, x, 0, 1); }) == "no product of integers takes groups of 4096");
}

TEST_CASE("bfloat16 with bfloat16: any length of row, 1 to 16 rows of x") {
  if (!kernels::multiplies_bfloat16()) {
    MESSAGE("skipped: this processor does not multiply bfloat16");
    return;
  }
  for (const std::int64_t K : {1, 2, 31, 32, 33, 63, 64, 65, 100, 771, 1536, 1545}) {
    for (std::int64_t M = 1; M <= kernels::kMostRows; ++M) {
      CAPTURE(K);
      CAPTURE(M);
      const Weights w = random_weights(Format::bfloat16, 29, K, 1, 27),
                    x = random_weights(Format::bfloat16, M, K, 1, 28);
      const auto* bits = static_cast<const std::uint16_t*>(x.stored());
      std::vector<float> y(static_cast<std::size_t>(M * 29)), part(y.size(), 12345);
      const auto* of_w = static_cast<const std::uint16_t*>(w.stored());
      kernels::linear_bfloat16(bits, M, K, of_w, y.data(), 29, 0, 29);
      kernels::linear_bfloat16(bits, M, K, of_w, part.data(), 29, 5, 11);
      std::int64_t differ = 0, found = 0, caught = 0;
      for (std::int64_t m = 0; m < M; ++m) {
        std::vector<double> values(x.exact.begin() + m * K, x.exact.begin() + (m + 1) * K);
        const std::vector<float> of_row(y.begin() + m * 29, y.begin() + (m + 1) * 29);
        found += wrong(w, values, of_row, K + 2);
        values[0] += 1;
        caught += wrong(w, values, of_row, K + 2);
        for (std::int64_t n = 0; n < 29; ++n) {
          const auto at = static_cast<std::size_t>(m * 29 + n);
          differ += part[at] != (n >= 5 && n < 11 ? y[at] : 12345);
        }
      }
      CHECK(found == 0);
      CHECK(caught > 0);
      CHECK(differ == 0);
    }
  }
}
