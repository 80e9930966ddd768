#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "error_of.h"
#include "instruction_sets.h"
#include "kernels.h"
#include "weights.h"

using namespace nanochat_x::test;
namespace kernels = nanochat_x::kernels;

namespace {

constexpr float kUntouched = 12345;
constexpr std::size_t kBlock = 32, kBlockBytes = 112;

/// A matrix [N, K] of float32 and what it is as nanochat_x/compact.py describes it. Blocks begin two bytes behind an
/// allocation, which is all that they need, and end with it: a sanitizer sees what is read too much.
struct CompactWeights {
  std::int64_t N, K;
  std::vector<float> exact;
  std::vector<std::uint8_t> blocks, bases;
  std::vector<std::int32_t> starts, columns;
  std::vector<float> values;

  kernels::Compact matrix() const {
    return {K,
            blocks.data() + 2,
            bases.data(),
            starts.data(),
            columns.data(),
            values.data(),
            static_cast<std::int64_t>(values.size())};
  }
};

/// Of each row's numbers, with exponents base to base + 15, some are exceptions: zeros, and what is out of range.
CompactWeights compact_weights(std::int64_t N, std::int64_t K, std::uint32_t seed) {
  std::mt19937 random(seed);
  CompactWeights w{N, K, {}, {0, 0}, {}, {0}, {}, {}};
  for (std::int64_t row = 0; row < N; ++row) {
    const std::uint32_t base = 112 + static_cast<std::uint32_t>(random()) % 4;
    w.bases.push_back(static_cast<std::uint8_t>(base));
    for (std::int64_t begin = 0; begin < K; begin += static_cast<std::int64_t>(kBlock)) {
      std::uint8_t block[kBlockBytes] = {};
      for (std::size_t i = 0; i < kBlock; ++i) {
        std::uint32_t exponent = base + static_cast<std::uint32_t>(random()) % 16;
        std::uint32_t digits = static_cast<std::uint32_t>(random()) & 0x807FFFFF;
        if (random() % 29 == 0) {  // an exception
          const bool zero = random() % 2 == 0;
          const float value =
              zero ? 0.0F : std::bit_cast<float>(digits | (random() % 2 == 0 ? base - 40 : base + 16) << 23);
          w.columns.push_back(static_cast<std::int32_t>(begin + static_cast<std::int64_t>(i)));
          w.values.push_back(value);
          w.exact.push_back(value);
          continue;
        }
        w.exact.push_back(std::bit_cast<float>(digits | exponent << 23));
        block[2 * i] = static_cast<std::uint8_t>(digits);
        block[2 * i + 1] = static_cast<std::uint8_t>(digits >> 8);
        block[64 + i] = static_cast<std::uint8_t>((digits >> 16 & 127) | digits >> 31 << 7);
        std::uint8_t& codes = block[96 + i % 16];
        codes = static_cast<std::uint8_t>(codes | (exponent - base) << (i < 16 ? 0 : 4));
      }
      w.blocks.insert(w.blocks.end(), block, block + kBlockBytes);
    }
    w.starts.push_back(static_cast<std::int32_t>(w.values.size()));
  }
  return w;
}

/// How many of y [M, N] are further from the product in double than float32 allows (as in weights.h). What stands
/// in the place of an exception, and is taken off again, is no larger than 2^(base - 127): its magnitude is added.
std::int64_t wrong(const CompactWeights& w, const std::vector<float>& x, std::int64_t M, const std::vector<float>& y) {
  const double n = static_cast<double>(w.K) + 4, g = n * kUnit / (1 - n * kUnit);
  std::int64_t found = 0;
  for (std::int64_t m = 0; m < M; ++m) {
    for (std::int64_t row = 0; row < w.N; ++row) {
      const double placeholder = std::ldexp(1.0, w.bases[static_cast<std::size_t>(row)] - 127);
      double sum = 0, magnitudes = 0;
      for (std::int64_t k = 0; k < w.K; ++k) {
        const double factor = x[static_cast<std::size_t>(m * w.K + k)];
        const double weight = w.exact[static_cast<std::size_t>(row * w.K + k)];
        sum += factor * weight;
        magnitudes += std::abs(factor) * (std::abs(weight) + 2 * placeholder);
      }
      found += !(std::abs(y[static_cast<std::size_t>(m * w.N + row)] - sum) <= g * magnitudes);  // NaN must count
    }
  }
  return found;
}

}  // namespace

TEST_CASE("compact: becomes the matrix, bit by bit, from any row to any other") {
  with_each_instruction_set([] {
    for (const std::int64_t K : {32, 64, 768, 1024}) {
      const CompactWeights w = compact_weights(37, K, static_cast<std::uint32_t>(K));
      for (const auto& [begin, end] : {std::pair{0, 37}, {5, 30}, {36, 37}, {7, 7}}) {
        std::vector<float> out(static_cast<std::size_t>((end - begin) * K) + 1, kUntouched);
        kernels::widen_compact(w.matrix(), out.data(), begin, end);
        CHECK(out.back() == kUntouched);
        CHECK(std::memcmp(out.data(), w.exact.data() + begin * K, (out.size() - 1) * sizeof(float)) == 0);
      }
    }
  });
}

TEST_CASE("compact: products, 1 to 16 rows of x and many") {
  with_each_instruction_set([] {
    for (const std::int64_t K : {32, 96, 768, 1600}) {
      const CompactWeights w = compact_weights(61, K, static_cast<std::uint32_t>(K + 1));
      for (const std::int64_t M : {1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 17, 40}) {
        CAPTURE(K);
        CAPTURE(M);
        const std::vector<float> x = random_floats(static_cast<std::size_t>(M * K), static_cast<std::uint32_t>(M));
        std::vector<float> y(static_cast<std::size_t>(M * w.N), kUntouched);
        const auto multiply = [&](const kernels::Compact& matrix) {
          if (M <= kernels::kMostRows) {
            kernels::linear_compact(x.data(), M, matrix, y.data(), w.N, 0, 24);
            kernels::linear_compact(x.data(), M, matrix, y.data(), w.N, 24, w.N);
          } else {
            kernels::matmul(x.data(), M, matrix, y.data(), w.N, 0, 48);
            kernels::matmul(x.data(), M, matrix, y.data(), w.N, 48, w.N);
          }
        };
        multiply(w.matrix());
        CHECK(wrong(w, x, M, y) == 0);
        // A bit of exponents, and exceptions of other values, are seen.
        CompactWeights spoilt = w;
        for (std::size_t i = 0; i < 16; ++i) spoilt.blocks[2 + 96 + i] ^= 8 | 8 << 4;
        multiply(spoilt.matrix());
        CHECK(wrong(w, x, M, y) > 0);
        spoilt = w;
        for (std::size_t i = 0; i < w.values.size(); ++i) spoilt.values[i] = std::abs(w.values[i]) + 1;
        multiply(spoilt.matrix());
        CHECK(wrong(w, x, M, y) > 0);
      }
    }
  });
}

TEST_CASE("compact: what is not finite stays so") {
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  with_each_instruction_set([] {
    CompactWeights w = compact_weights(3, 64, 5);
    REQUIRE(w.starts[1] > 0);
    for (const float value : {inf, -inf, nan}) {
      w.values[0] = value;
      const std::vector<float> x(64, 1.0F);
      std::vector<float> y(3);
      kernels::linear_compact(x.data(), 1, w.matrix(), y.data(), 3, 0, 3);
      CHECK((std::isnan(value) ? std::isnan(y[0]) : y[0] == value));
      CHECK(std::isfinite(y[1]));
    }
  });
}

TEST_CASE("compact: exceptions that are none of the matrix's, and sizes that make no sense, are refused") {
  const CompactWeights w = compact_weights(3, 64, 6);
  const std::vector<float> x(64, 1.0F);
  std::vector<float> y(3 * 64);
  const auto error = [&](const CompactWeights& weights, std::int64_t K = 64) {
    kernels::Compact matrix = weights.matrix();
    matrix.K = K;
    const std::string of_product = error_of([&] { kernels::linear_compact(x.data(), 1, matrix, y.data(), 3, 0, 3); });
    CHECK(of_product == error_of([&] { kernels::widen_compact(matrix, y.data(), 0, 3); }));
    return of_product;
  };
  CHECK(error(w).empty());
  CHECK(error(w, 40) == "rows of a compact matrix hold a multiple of 32 values; got 40");
  CompactWeights spoilt = w;
  spoilt.columns[0] = 64;
  CHECK(error(spoilt) == "a compact matrix: an exception in column 64 of 64");
  spoilt.columns[0] = -1;
  CHECK(error(spoilt) == "a compact matrix: an exception in column -1 of 64");
  spoilt = w;
  spoilt.starts[3] += 1;
  const std::string end = std::to_string(spoilt.starts[3]), count = std::to_string(w.values.size());
  CHECK(error(spoilt) ==
        "a compact matrix: row 2 has exceptions " + std::to_string(w.starts[2]) + " to " + end + " of " + count);
  spoilt = w;
  spoilt.starts[0] = -1;
  CHECK(error(spoilt) ==
        "a compact matrix: row 0 has exceptions -1 to " + std::to_string(w.starts[1]) + " of " + count);
}
