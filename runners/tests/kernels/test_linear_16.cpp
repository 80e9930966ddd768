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

using Row = kernels::QuantizedRow;
constexpr Row::Layout kLayouts[] = {Row::Layout::words, Row::Layout::bytes};

int bits_of(Format format) { return format == Format::int8 ? 8 : 4; }

Row row_of(const std::vector<float>& x, std::int64_t group, int bits, Row::Layout layout) {
  return {x.data(), static_cast<std::int64_t>(x.size()), group, bits, layout};
}

/// `test(group, layout)` for those of the groups that there are products of with weights of 8 bits. Returns how many.
template <typename Test>
int with_each_layout(std::initializer_list<std::int64_t> groups, Test&& test) {
  int taken = 0;
  for (const std::int64_t group : groups) {
    for (const Row::Layout layout : kLayouts) {
      if (!Row::takes(layout, 8, group)) continue;
      CAPTURE(group);
      CAPTURE(static_cast<int>(layout));
      test(group, layout);
      ++taken;
    }
  }
  return taken;
}

std::vector<float> product(const Weights& w, const Row& x, std::int64_t begin, std::int64_t end) {
  std::vector<float> y(static_cast<std::size_t>(w.N), 12345);
  const std::uint16_t* scales = w.scales.data() + 1;
  if (w.format == Format::int8) {
    const auto* q = static_cast<const std::int8_t*>(w.stored());
    kernels::linear_int8(x, q, scales, y.data(), begin, end);
  } else {
    const auto* q = static_cast<const std::uint8_t*>(w.stored());
    kernels::linear_int4(x, q, scales, w.zeros.data() + 1, y.data(), begin, end);
  }
  return y;
}

}  // namespace

TEST_CASE("a row in integers: every value within half a step, the largest exactly, zero as zero") {
  with_each_instruction_set([] {
    const int taken = with_each_layout({16, 32, 64, 96}, [](std::int64_t group, Row::Layout layout) {
      std::vector<float> x = uneven_floats(4 * group, group, 21);
      std::fill_n(x.begin() + 2 * group, group, 0.0F);
      const Row to = row_of(x, group, 8, layout);
      REQUIRE(to.finite());
      for (std::int64_t g = 0; g < 4; ++g) {
        double largest = 0, sum = 0;
        std::int64_t far = 0, most = 0;
        for (std::int64_t i = g * group; i < (g + 1) * group; ++i) {
          largest = std::max(largest, std::abs(double{x[static_cast<std::size_t>(i)]}));
        }
        for (std::int64_t i = g * group; i < (g + 1) * group; ++i) {
          const double value = static_cast<double>(to.q()[i]) * to.scales()[g];
          // Half a step, and what float32 rounds in the scale, its inverse and their product with a value.
          far += !(std::abs(value - x[static_cast<std::size_t>(i)]) <= largest * (0.5 / 32639 + 4 * kUnit));
          sum += value;
          most = std::max<std::int64_t>(most, std::abs(to.q()[i]));
        }
        CHECK(far == 0);
        CHECK(most == (g == 2 ? 0 : 32639));
        // (the integers' sum as float32, times the scale)
        CHECK(std::abs(to.sums()[g] - sum) <= 3 * kUnit * std::abs(sum));
      }
    });
    CHECK(taken > 0);
  });
}

TEST_CASE("a row in integers: neither NaN nor infinity is one") {
  with_each_instruction_set([] {
    const int taken = with_each_layout({32}, [](std::int64_t group, Row::Layout layout) {
      for (const float odd : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                              -std::numeric_limits<float>::infinity()}) {
        for (const std::size_t at : {0U, 17U, 63U}) {
          std::vector<float> x = random_floats(64, 22);
          REQUIRE(row_of(x, group, 8, layout).finite());
          x[at] = odd;
          CHECK(!row_of(x, group, 8, layout).finite());
        }
      }
      // The smallest and the largest numbers there are
      std::vector<float> x(32, std::numeric_limits<float>::denorm_min());
      CHECK(row_of(x, group, 8, layout).finite());
      x[3] = std::numeric_limits<float>::max();
      const Row to = row_of(x, group, 8, layout);
      CHECK(to.finite());
      CHECK(to.q()[3] == 32639);
      CHECK(to.q()[4] == 0);
    });
    CHECK(taken > 0);
  });
}

TEST_CASE("integers with int8 and int4: the product of what they stand for") {
  with_each_instruction_set([] {
    std::int64_t taken = 0;
    for (const Format format : {Format::int8, Format::int4}) {
      for (const std::int64_t group : {16, 24, 32, 40, 64, 96, 128, 256, 512}) {
        for (const Row::Layout layout : kLayouts) {
          if (!Row::takes(layout, bits_of(format), group)) continue;
          ++taken;
          for (const std::int64_t groups : {1, 3, 24, 70}) {
            if (group * groups > 10'000) continue;
            CAPTURE(name_of(format));
            CAPTURE(static_cast<int>(layout));
            CAPTURE(group);
            CAPTURE(groups);
            const Weights w = random_weights(format, 13, group * groups, group, 23);
            const Row x = row_of(uneven_floats(w.K, group, 21), group, bits_of(format), layout);
            std::vector<double> values;
            for (std::int64_t i = 0; i < w.K; ++i) {
              values.push_back(static_cast<double>(x.q()[i]) * x.scales()[i / group]);
            }
            // A group's sum becomes a float32 and is multiplied by a product of two scales; then groups and lanes are
            // added. In bytes zero points of int4 are subtracted at the end: q x and zero x are rounded, whose
            // magnitudes are 7.5 |x| each on average where that of (q - zero) x is 5 |x|.
            const std::int64_t once = groups + 3 + 16;
            const std::int64_t roundings = format == Format::int4 && layout == Row::Layout::bytes ? 3 * once : once;
            const std::vector<float> y = product(w, x, 0, w.N);
            CHECK(wrong(w, values, 1, y, roundings) == 0);
            std::vector<double> other = values;
            other.back() += *std::max_element(values.begin(), values.end()) + 1;
            CHECK(wrong(w, other, 1, y, roundings) > 0);
            const std::vector<float> part = product(w, x, 3, 10);
            CHECK(std::equal(part.begin() + 3, part.begin() + 10, y.begin() + 3));
            CHECK(part[2] == 12345);
            CHECK(part[10] == 12345);
          }
        }
      }
    }
    CHECK(taken > 0);
  });
}

TEST_CASE("integers: the largest there are do not overflow") {
  with_each_instruction_set([] {
    const int taken = with_each_layout({32, 64, 512}, [](std::int64_t group, Row::Layout layout) {
      Weights w = random_weights(Format::int8, 4, group, group, 24);
      std::fill(w.bytes.begin() + 1, w.bytes.end(), std::uint8_t{128});  // -128
      std::fill(w.scales.begin() + 1, w.scales.end(), std::uint16_t{0x3f80});
      for (const float largest : {-32639.0F, 32639.0F}) {
        const Row x = row_of(std::vector<float>(static_cast<std::size_t>(group), largest), group, 8, layout);
        for (const float y : product(w, x, 0, 4)) CHECK(y == -128.0F * largest * static_cast<float>(group));
      }
    });
    CHECK(taken > 0);
  });
}

TEST_CASE("integers: what has no product is refused") {
  CHECK(!Row::best(8, 4096));
  for (const Row::Layout layout : kLayouts) {
    CHECK(error_of([&] { (void)row_of(random_floats(4096, 26), 4096, 8, layout); }) ==
          "no product of integers takes groups of 4096");
  }
  const Weights w = random_weights(Format::int8, 1, 64, 32, 25);
  std::vector<float> x = random_floats(64, 26);
  const Row::Layout layout = Row::best(8, 32).value();
  CHECK(error_of([&] { (void)product(w, row_of(x, 32, 4, Row::best(4, 32).value()), 0, 1); }) ==
        "a row of x for weights of 4 bits does not fit those of 8");
  CHECK(error_of([&] { (void)product(w, row_of(x, 32, 8, layout), 2, 1); }) ==
        "rows of weights: from 2 to 1 is no range");
  x[5] = std::numeric_limits<float>::infinity();
  CHECK(error_of([&] { (void)product(w, row_of(x, 32, 8, layout), 0, 1); }) ==
        "a row of x that is not finite has no product in integers");
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
        found += wrong(w, values, 1, of_row, K + 2);
        values[0] += 1;
        caught += wrong(w, values, 1, of_row, K + 2);
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
