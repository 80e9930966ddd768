// Products of many rows in integers with int8 and int4.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "error_of.h"
#include "integers.h"
#include "kernels.h"
#include "weights.h"

using namespace nanochat_x::test;
namespace kernels = nanochat_x::kernels;

namespace {

constexpr float kUntouched = 12345;

/// Whether there are such products; says so if not.
bool there_are() {
  if (kernels::QuantizedRows::takes(32)) return true;
  MESSAGE("skipped: this processor has no product of bytes (AVX-512 VNNI)");
  return false;
}

/// [M, N] of rows [begin, end) of w; the rest untouched.
std::vector<float> product(const Weights& w, const kernels::QuantizedRows& x, std::int64_t begin, std::int64_t end) {
  std::vector<float> y(static_cast<std::size_t>(x.rows() * w.N), kUntouched);
  const std::uint16_t* scales = w.scales.data() + 1;
  if (w.format == Format::int8) {
    kernels::matmul_int8(x, static_cast<const std::int8_t*>(w.stored()), scales, y.data(), w.N, begin, end);
  } else {
    kernels::matmul_int4(x, static_cast<const std::uint8_t*>(w.stored()), scales, w.zeros.data() + 1, y.data(), w.N,
                         begin, end);
  }
  return y;
}

kernels::QuantizedRows rows_of(const std::vector<float>& x, std::int64_t M, std::int64_t group) {
  const std::int64_t K = static_cast<std::int64_t>(x.size()) / M;
  kernels::QuantizedRows rows(M, K, group);
  // In two parts, as threads do
  const std::int64_t middle = M / 2 / kernels::QuantizedRows::kTogether * kernels::QuantizedRows::kTogether;
  REQUIRE(rows.quantize(x.data(), middle, M));
  REQUIRE(rows.quantize(x.data(), 0, middle));
  return rows;
}

/// What the integers of x [M, K] stand for.
std::vector<double> meant(const std::vector<float>& x, std::int64_t M, std::int64_t group) {
  const std::int64_t K = static_cast<std::int64_t>(x.size()) / M;
  std::vector<std::int16_t> q(static_cast<std::size_t>(K));
  std::vector<float> scales(static_cast<std::size_t>(K / group)), sums(scales.size());
  std::vector<double> values;
  for (std::int64_t m = 0; m < M; ++m) {
    REQUIRE(kernels::integers_of(x.data() + m * K, K, group, q.data(), scales.data(), sums.data()));
    for (std::int64_t k = 0; k < K; ++k) {
      values.push_back(static_cast<double>(q[static_cast<std::size_t>(k)]) *
                       scales[static_cast<std::size_t>(k / group)]);
    }
  }
  return values;
}

}  // namespace

TEST_CASE("many rows in integers: the product of what they stand for, tiles and panels that are not full") {
  if (!there_are()) return;
  std::uint32_t seed = 40;
  for (const Format format : {Format::int8, Format::int4}) {
    for (const std::int64_t group : {16, 24, 32, 96, 256, 512}) {
      for (const auto& [M, N, groups] : {std::tuple{1, 1, 1}, {16, 5, 3}, {17, 48, 9}, {33, 50, 2}, {70, 99, 5}}) {
        CAPTURE(name_of(format));
        CAPTURE(group);
        CAPTURE(M);
        const Weights w = random_weights(format, N, group * groups, group, ++seed);
        const std::vector<float> x = uneven_floats(M * w.K, group, ++seed);
        const kernels::QuantizedRows rows = rows_of(x, M, group);
        std::vector<double> values = meant(x, M, group);
        const std::vector<float> y = product(w, rows, 0, N);
        // A group's sum becomes a float32 and is multiplied by a product of two scales; then groups are added.
        const std::int64_t roundings = groups + 3;
        CHECK(wrong(w, values, M, y, roundings) == 0);
        values.back() += *std::max_element(values.begin(), values.end()) + 1;
        CHECK(wrong(w, values, M, y, roundings) > 0);
        const std::int64_t begin = N / 3, end = N - N / 4;
        const std::vector<float> part = product(w, rows, begin, end);
        std::int64_t differ = 0;
        for (std::int64_t i = 0; i < M * N; ++i) {
          const bool inside = i % N >= begin && i % N < end;
          const auto at = static_cast<std::size_t>(i);
          differ += part[at] != (inside ? y[at] : kUntouched);
        }
        CHECK(differ == 0);
      }
    }
  }
}

TEST_CASE("many rows in integers: the largest there are do not overflow") {
  if (!there_are()) return;
  for (const std::int64_t group : {32, 512}) {
    Weights w8 = random_weights(Format::int8, 4, group, group, 24),
            w4 = random_weights(Format::int4, 4, group, group, 24);
    std::fill(w8.bytes.begin() + 1, w8.bytes.end(), std::uint8_t{128});  // -128
    std::fill(w4.bytes.begin() + 1, w4.bytes.end(), std::uint8_t{0});    // 0 - 15
    std::fill(w4.zeros.begin() + 1, w4.zeros.end(), std::uint8_t{15});
    for (Weights* w : {&w8, &w4}) std::fill(w->scales.begin() + 1, w->scales.end(), std::uint16_t{0x3f80});
    for (const float largest : {-32639.0F, 32639.0F}) {
      const auto rows = rows_of(std::vector<float>(static_cast<std::size_t>(17 * group), largest), 17, group);
      for (const float y : product(w8, rows, 0, 4)) CHECK(y == -128.0F * largest * static_cast<float>(group));
      for (const float y : product(w4, rows, 0, 4)) CHECK(y == -15.0F * largest * static_cast<float>(group));
    }
  }
}

TEST_CASE("many rows in integers: what is not finite has none, and what has no product is refused") {
  CHECK(!kernels::QuantizedRows::takes(520));
  if (!there_are()) {
    CHECK(error_of([] { kernels::QuantizedRows(1, 32, 32); }) == "this processor has no product of bytes");
    return;
  }
  for (const float odd : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    for (const std::size_t at : {0U, 700U, 17U * 64 - 1}) {
      std::vector<float> x = random_floats(17 * 64, 30);
      kernels::QuantizedRows rows(17, 64, 32);
      CHECK(rows.quantize(x.data(), 0, 17));
      x[at] = odd;
      CHECK(!rows.quantize(x.data(), 0, 17));
    }
  }
  CHECK(error_of([] { kernels::QuantizedRows(1, 1040, 520); }) ==
        "no product of many rows in integers takes groups of 520");
  CHECK(error_of([] { kernels::QuantizedRows(0, 32, 32); }) == "a product takes 1 row or more; got 0");
  CHECK(error_of([] { kernels::QuantizedRows(1, 40, 32); }) ==
        "a group of quantised weights must be a multiple of 8, from 16 on, that divides the row; got 32 of 40");
  kernels::QuantizedRows rows(40, 32, 32);
  const std::vector<float> x(40 * 32);
  CHECK(error_of([&] { rows.quantize(x.data(), 8, 16); }) == "rows of x: from 8 to 16 of 40 are no whole tiles");
  CHECK(error_of([&] { rows.quantize(x.data(), 0, 48); }) == "rows of x: from 0 to 48 of 40 are no whole tiles");
  CHECK(error_of([&] { rows.quantize(x.data(), 0, 24); }) == "rows of x: from 0 to 24 of 40 are no whole tiles");
  REQUIRE(rows.quantize(x.data(), 0, 40));
  const Weights w = random_weights(Format::int8, 1, 32, 32, 25);
  CHECK(error_of([&] { (void)product(w, rows, 2, 1); }) == "rows of weights: from 2 to 1 is no range");
}
