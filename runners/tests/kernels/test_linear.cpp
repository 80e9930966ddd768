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

constexpr float kUntouched = 12345;
/// How many of y [M, N] are further from the product than float32 allows. Roundings are K, and 2 for the scale of a
/// group and for the last sum over lanes, which adds zeros where a row is shorter than they are.
std::int64_t wrong(const Weights& w, const std::vector<float>& x, std::int64_t M, const std::vector<float>& y) {
  return nanochat_x::test::wrong(w, {x.begin(), x.end()}, M, y, w.K + 2);
}

std::vector<float> product(const Weights& w, const std::vector<float>& x, std::int64_t M) {
  std::vector<float> y(static_cast<std::size_t>(M * w.N));
  w.multiply(x.data(), M, y.data(), w.N, 0, w.N);
  return y;
}

std::vector<float> rows_of_x(std::int64_t M, std::int64_t K) {
  return random_floats(static_cast<std::size_t>(M * K), static_cast<std::uint32_t>(100 * M + K));
}

}  // namespace

TEST_CASE("linear: all types, any length of row, 1 to 16 rows of x") {
  with_each_instruction_set([] {
    for (const Format format : {Format::float32, Format::bfloat16, Format::float16}) {
      for (const std::int64_t K : {1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 100, 257, 771}) {
        const Weights w = random_weights(format, 13, K, 1, 7);
        for (std::int64_t M = 1; M <= kernels::kMostRows; ++M) {
          CAPTURE(name_of(format));
          CAPTURE(K);
          CAPTURE(M);
          const std::vector<float> x = rows_of_x(M, K);
          CHECK(wrong(w, x, M, product(w, x, M)) == 0);
        }
      }
    }
  });
}

TEST_CASE("linear: rows of w and columns that are computed in several blocks") {
  with_each_instruction_set([] {
    for (const Format format : {Format::float32, Format::bfloat16, Format::float16}) {
      for (const std::int64_t K : {768, 800, 1545}) {
        const Weights w = random_weights(format, 61, K, 1, 8);
        for (const std::int64_t M : {1, 2, 3, 4, 5, 8, 11, 16}) {
          CAPTURE(name_of(format));
          CAPTURE(K);
          CAPTURE(M);
          const std::vector<float> x = rows_of_x(M, K);
          CHECK(wrong(w, x, M, product(w, x, M)) == 0);
        }
      }
    }
  });
}

TEST_CASE("matmul: all types, any length of row, many rows of x, panels that are not full") {
  with_each_instruction_set([] {
    for (const Format format : {Format::float32, Format::bfloat16, Format::float16}) {
      for (const std::int64_t K : {1, 3, 4, 15, 16, 17, 33, 768, 1545}) {
        for (const std::int64_t N : {1, 5, 47, 48, 49, 101}) {
          const Weights w = random_weights(format, N, K, 1, 9);
          for (const std::int64_t M : {1, 4, 7, 17, 33}) {
            CAPTURE(name_of(format));
            CAPTURE(K);
            CAPTURE(N);
            CAPTURE(M);
            const std::vector<float> x = rows_of_x(M, K);
            std::vector<float> y(static_cast<std::size_t>(M * N), kUntouched);
            kernels::matmul(x.data(), M, K, w.stored(), type_of(format), y.data(), N, 0, N);
            CHECK(wrong(w, x, M, y) == 0);
            std::vector<float> other = x;
            for (float& value : other) value = -value;
            CHECK(wrong(w, other, M, y) > 0);
          }
        }
      }
    }
  });
}

TEST_CASE("matmul: a part of the rows of w gives the same and touches nothing else, and so does a part of x") {
  with_each_instruction_set([] {
    constexpr std::int64_t M = 21, N = 150, K = 800, kBegin = 48, kEnd = 131;
    const Weights w = random_weights(Format::float32, N, K, 1, 10);
    const std::vector<float> x = rows_of_x(M, K);
    std::vector<float> whole(static_cast<std::size_t>(M * N)), part(whole.size(), kUntouched), below(whole);
    kernels::matmul(x.data(), M, K, w.stored(), kernels::Type::float32, whole.data(), N, 0, N);
    kernels::matmul(x.data(), M, K, w.stored(), kernels::Type::float32, part.data(), N, kBegin, kEnd);
    std::int64_t differ = 0;
    for (std::int64_t i = 0; i < M * N; ++i) {
      const bool inside = i % N >= kBegin && i % N < kEnd;
      differ += part[static_cast<std::size_t>(i)] != (inside ? whole[static_cast<std::size_t>(i)] : kUntouched);
    }
    CHECK(differ == 0);
    kernels::matmul(x.data() + 3 * K, M - 3, K, w.stored(), kernels::Type::float32, below.data(), N, 0, N);
    CHECK(std::equal(below.begin(), below.end() - 3 * N, whole.begin() + 3 * N));
  });
}

TEST_CASE("matmul: sizes that make no sense are refused") {
  const float one = 1;
  float y = kUntouched;
  const auto call = [&](std::int64_t M, std::int64_t K, std::int64_t begin, std::int64_t end) {
    return error_of(
        [&, M, K, begin, end] { kernels::matmul(&one, M, K, &one, kernels::Type::float32, &y, 1, begin, end); });
  };
  CHECK(call(0, 1, 0, 1) == "a product takes 1 row or more; got 0");
  CHECK(call(1, 0, 0, 1) == "rows of weights must hold 1 value or more; got 0");
  CHECK(call(1, 1, 1, 0) == "rows of weights: from 1 to 0 is no range");
  CHECK(y == kUntouched);
}

TEST_CASE("linear: quantised weights, groups that are and are no multiple of a vector") {
  with_each_instruction_set([] {
    for (const Format format : {Format::int8, Format::int4}) {
      for (const std::int64_t group : {16, 24, 32, 40, 48, 56, 64, 72, 96, 128, 256}) {
        for (const std::int64_t groups : {1, 3}) {
          const Weights w = random_weights(format, 13, groups * group, group, 8);
          for (std::int64_t M = 1; M <= kernels::kMostRows; ++M) {
            CAPTURE(name_of(format));
            CAPTURE(group);
            CAPTURE(groups);
            CAPTURE(M);
            const std::vector<float> x = rows_of_x(M, w.K);
            CHECK(wrong(w, x, M, product(w, x, M)) == 0);
          }
        }
      }
    }
  });
}

TEST_CASE("linear: parts of the rows are the whole, to the bit, and nothing else is written") {
  with_each_instruction_set([] {
    for (const Format format : {Format::float32, Format::bfloat16, Format::float16, Format::int8, Format::int4}) {
      const Weights w = random_weights(format, 61, 96, 32, 9);
      for (const std::int64_t M : {1, 2, 3, 8, 11}) {
        const std::vector<float> x = rows_of_x(M, w.K), whole = product(w, x, M);
        for (std::int64_t begin = 0; begin < w.N; begin += 7) {
          for (const std::int64_t count : {0, 1, 5, 26}) {
            CAPTURE(name_of(format));
            CAPTURE(begin);
            CAPTURE(count);
            const std::int64_t end = std::min(w.N, begin + count), stride = w.N + 3;
            std::vector<float> y(static_cast<std::size_t>(M * stride), kUntouched), expected = y;
            for (std::int64_t m = 0; m < M; ++m) {
              for (std::int64_t n = begin; n < end; ++n) {
                expected[static_cast<std::size_t>(m * stride + n)] = whole[static_cast<std::size_t>(m * w.N + n)];
              }
            }
            w.multiply(x.data(), M, y.data(), stride, begin, end);
            CHECK(y == expected);
          }
        }
      }
    }
  });
}

TEST_CASE("linear: what is not finite stays so") {
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  with_each_instruction_set([] {
    for (const Format format : {Format::float32, Format::bfloat16, Format::float16, Format::int8, Format::int4}) {
      const Weights w = random_weights(format, 9, 72, 24, 10);
      for (const std::int64_t k : {0, 23, 63, 71}) {
        for (const std::int64_t M : {1, 3}) {
          CAPTURE(name_of(format));
          CAPTURE(k);
          std::vector<float> x = rows_of_x(M, w.K);
          x[static_cast<std::size_t>(k)] = nan;
          std::vector<float> y = product(w, x, M);
          for (std::int64_t n = 0; n < w.N; ++n) CHECK(std::isnan(y[static_cast<std::size_t>(n)]));
          x[static_cast<std::size_t>(k)] = inf;
          y = product(w, x, M);
          for (std::int64_t n = 0; n < w.N; ++n) {
            const double weight = w.exact[static_cast<std::size_t>(n * w.K + k)];
            const float got = y[static_cast<std::size_t>(n)];
            CHECK((weight == 0 ? std::isnan(got) : got == (weight > 0 ? inf : -inf)));
          }
          for (std::int64_t i = w.N; i < M * w.N; ++i) CHECK(std::isfinite(y[static_cast<std::size_t>(i)]));
        }
      }
    }
  });
}

TEST_CASE("linear: a wrong answer is seen") {
  for (const Format format : {Format::float32, Format::bfloat16, Format::float16, Format::int8, Format::int4}) {
    CAPTURE(name_of(format));
    Weights w = random_weights(format, 13, 768, 64, 11);
    const std::vector<float> x = rows_of_x(3, w.K), y = product(w, x, 3);
    REQUIRE(wrong(w, x, 3, y) == 0);
    double& weight = w.exact[5 * 768 + 700];
    const double before = std::exchange(weight, weight + *std::max_element(w.exact.begin(), w.exact.end()));
    CHECK(wrong(w, x, 3, y) == 3);
    weight = before;
    std::vector<float> swapped = y;
    std::swap(swapped[3], swapped[4]);
    CHECK(wrong(w, x, 3, swapped) == 2);
    swapped[0] = std::numeric_limits<float>::quiet_NaN();
    CHECK(wrong(w, x, 3, swapped) == 3);
  }
}

TEST_CASE("widen: every weight exactly, for any rows") {
  with_each_instruction_set([] {
    for (const Format format : {Format::int8, Format::int4}) {
      for (const std::int64_t group : {16, 24, 32, 40, 64, 72, 128}) {
        const Weights w = random_weights(format, 5, 3 * group, group, 12);
        CAPTURE(name_of(format));
        CAPTURE(w.K);
        CAPTURE(w.group);
        const std::vector<float> all = w.widened(0, 5), part = w.widened(2, 4);
        CHECK(std::equal(all.begin(), all.end(), w.exact.begin(), w.exact.end()));
        CHECK(std::equal(part.begin(), part.end(), w.exact.begin() + 2 * w.K, w.exact.begin() + 4 * w.K));
      }
    }
  });
}

TEST_CASE("widen to bfloat16: the nearest to every weight, the even one of two") {
  const auto value = [](int bits) { return value_of(Format::bfloat16, static_cast<std::uint16_t>(bits)); };
  const auto nearest = [&](double exact, int bits) {
    const double distance = std::abs(value(bits) - exact);
    // Neighbours in magnitude; there is none below zero.
    for (const int other : {bits + 1, bits - 1}) {
      if ((bits & 0x7fff) == 0 && other < bits) continue;
      const double further = std::abs(value(other) - exact);
      if (further < distance || (further == distance && bits % 2 != 0)) return false;
    }
    return true;
  };
  CHECK(nearest(1, 0x3f80));
  CHECK(!nearest(1, 0x3f81));
  CHECK(!nearest((value(0x3f80) + value(0x3f81)) / 2, 0x3f81));  // of two the odd one
  std::int64_t ties = 0;
  with_each_instruction_set([&] {
    for (const Format format : {Format::int8, Format::int4}) {
      for (const std::int64_t group : {16, 24, 32, 40, 64, 72, 128}) {
        const Weights w = random_weights(format, 5, 3 * group, group, 14);
        CAPTURE(name_of(format));
        CAPTURE(w.group);
        const std::vector<std::uint16_t> all = w.rounded(0, 5), part = w.rounded(2, 4);
        std::int64_t wrong = 0;
        for (std::size_t i = 0; i < all.size(); ++i) {
          wrong += !nearest(w.exact[i], all[i]);
          ties += std::abs(value(all[i]) - w.exact[i]) == std::abs(value(all[i] + 1) - w.exact[i]);
        }
        CHECK(wrong == 0);
        CHECK(std::equal(part.begin(), part.end(), all.begin() + 2 * w.K));
      }
    }
  });
  CHECK(ties > 0);
}

TEST_CASE("linear and widen: sizes that are not taken are refused") {
  const std::vector<float> x(64);
  std::vector<float> y(64);
  std::vector<std::uint16_t> halves(64);
  const Weights w = random_weights(Format::int8, 1, 64, 16, 13);
  const auto* q = static_cast<const std::int8_t*>(w.stored());
  const auto linear = [&](std::int64_t M, std::int64_t K, std::int64_t begin, std::int64_t end) {
    return error_of(
        [&] { kernels::linear(x.data(), M, K, x.data(), kernels::Type::float32, y.data(), 1, begin, end); });
  };
  CHECK(linear(0, 8, 0, 1) == "a product takes 1 to 16 rows at once; got 0");
  CHECK(linear(17, 1, 0, 1) == "a product takes 1 to 16 rows at once; got 17");
  CHECK(linear(1, 0, 0, 1) == "rows of weights must hold 1 value or more; got 0");
  CHECK(linear(1, 8, 1, 0) == "rows of weights: from 1 to 0 is no range");
  CHECK(linear(1, 8, -1, 0) == "rows of weights: from -1 to 0 is no range");
  for (const std::int64_t group : {0, 8, 20, 48, 128}) {
    CAPTURE(group);
    const std::string message =
        "a group of quantised weights must be a multiple of 8, from 16 on, that divides the row; got " +
        std::to_string(group) + " of 64";
    CHECK(error_of([&] { kernels::linear_int8(x.data(), 1, 64, q, w.scales.data(), group, y.data(), 1, 0, 1); }) ==
          message);
    CHECK(error_of([&] {
            kernels::linear_int4(x.data(), 1, 64, w.zeros.data(), w.scales.data(), w.zeros.data(), group, y.data(), 1,
                                 0, 1);
          }) == message);
    CHECK(error_of([&] { kernels::widen_int8(64, q, w.scales.data(), group, y.data(), 0, 1); }) == message);
    CHECK(error_of([&] { kernels::widen_int8(64, q, w.scales.data(), group, halves.data(), 0, 1); }) == message);
    CHECK(error_of([&] {
            kernels::widen_int4(64, w.zeros.data(), w.scales.data(), w.zeros.data(), group, halves.data(), 0, 1);
          }) == message);
    CHECK(error_of([&] {
            kernels::widen_int4(64, w.zeros.data(), w.scales.data(), w.zeros.data(), group, y.data(), 0, 1);
          }) == message);
  }
}

TEST_CASE("kernels: the best instruction set is chosen, and others can be") {
  const std::string best = kernels::instruction_set();
  std::vector<std::string> tried;
  with_each_instruction_set([&tried] { tried.push_back(kernels::instruction_set()); });
  REQUIRE(!tried.empty());
  CHECK(tried.front() == best);
  CHECK(kernels::instruction_set() == best);
  std::string all;
  for (const std::string& name : tried) all += " " + name;
  MESSAGE("instruction sets tried:" << all);
}
