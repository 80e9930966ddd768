#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "calling.h"
#include "kernels.h"

using namespace nanochat_x::test;
namespace kernels = nanochat_x::kernels;

namespace {

constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};

// Of a result's own rounding.
double unit_of(ScalarType type) {
  return type == ScalarType::Float ? 0x1p-24 : type == ScalarType::Half ? 0x1p-11 : 0x1p-8;
}

// How many results are further from x times weight, transposed, in double than float32 sums and one rounding to `type`
// allow (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
std::int64_t wrong_products(const TensorPtr& x, const TensorPtr& weight, const TensorPtr& y) {
  const std::vector<double> a = values_of(x), w = values_of(weight), got = values_of(y);
  const std::size_t depth = static_cast<std::size_t>(weight->size(1)), columns = w.size() / depth;
  std::int64_t found = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    double exact = 0, magnitude = 0;
    for (std::size_t k = 0; k < depth; ++k) {
      const double product = a[i / columns * depth + k] * w[i % columns * depth + k];
      exact += product;
      magnitude += std::abs(product);
    }
    // Half of float16's smallest number where it has fewer bits
    const double bound = magnitude * static_cast<double>(depth) * 0x1p-24 + std::abs(exact) * unit_of(y->scalar_type());
    found += !(std::abs(got[i] - exact) <= bound + 0x1p-25);
  }
  return found;
}

struct Shape {
  SizesType batch, steps, heads, kv_heads, width, slots;
  std::int64_t window;
};

struct Attention {
  Shape shape;
  TensorPtr q, k, v, past_k, past_v, position, out;

  Attention(const Shape& s, ScalarType type)
      : shape(s),
        q(random_tensor({s.batch, s.steps, s.heads, s.width}, 1, type)),
        k(random_tensor({s.batch, s.kv_heads, s.steps, s.width}, 2, type)),
        v(random_tensor({s.batch, s.kv_heads, s.steps, s.width}, 3, type)),
        past_k(random_tensor({s.batch, s.kv_heads, s.slots, s.width}, 4, type)),
        past_v(random_tensor({s.batch, s.kv_heads, s.slots, s.width}, 5, type)),
        position(integers({s.batch}, std::vector<std::int64_t>(static_cast<std::size_t>(s.batch), s.slots - 1))),
        out(result_of({s.batch, s.steps, s.heads * s.width}, type)) {}

  std::string compute(bool with_past) const {
    const auto past = [&](const TensorPtr& t) { return with_past ? et::EValue(*t) : et::EValue(); };
    return call("attention", {*q, *k, *v, past(past_k), past(past_v), past(position), shape.window}, out);
  }

  // The largest distance from softmax(q . k / sqrt(D)) v over the visible keys, in double.
  double error(bool with_past) const {
    const std::vector<double> qs = values_of(q), got = values_of(out);
    const std::int64_t behind = with_past ? shape.slots - 1 : 0;
    double largest = 0;
    for (std::int64_t i = 0; i < std::int64_t{shape.batch} * shape.steps * shape.heads; ++i) {
      const std::int64_t b = i / (shape.steps * shape.heads), t = i / shape.heads % shape.steps;
      const std::int64_t row = b * shape.kv_heads + i % shape.heads / (shape.heads / shape.kv_heads);
      std::vector<double> sum(static_cast<std::size_t>(shape.width));
      double total = 0;
      for (std::int64_t at = 0; at <= behind + t; ++at) {
        if (shape.window >= 0 && at < behind + t - shape.window) continue;
        const bool old = at < behind;
        const std::int64_t from = (old ? row * shape.slots + at : row * shape.steps + at - behind) * shape.width;
        const std::vector<double> keys = values_of(old ? past_k : k), values = values_of(old ? past_v : v);
        double score = 0;
        for (std::int64_t d = 0; d < shape.width; ++d) {
          score += qs[static_cast<std::size_t>(i * shape.width + d)] * keys[static_cast<std::size_t>(from + d)];
        }
        const double p = std::exp(score / std::sqrt(static_cast<double>(shape.width)));
        total += p;
        for (std::size_t d = 0; d < sum.size(); ++d) sum[d] += p * values[static_cast<std::size_t>(from) + d];
      }
      for (std::size_t d = 0; d < sum.size(); ++d) {
        largest = std::max(largest, std::abs(got[static_cast<std::size_t>(i * shape.width) + d] - sum[d] / total));
      }
    }
    return largest;
  }
};

}  // namespace

TEST_CASE("executorch: linear, few rows and many, every dtype, leading dimensions kept") {
  for (const ScalarType type : kTypes) {
    for (const SizesType rows : {1, 2, 16, 17, 70}) {
      for (const auto& [columns, depth] : {std::pair{1, 1}, {7, 33}, {300, 128}}) {
        CAPTURE(static_cast<int>(type));
        CAPTURE(rows);
        CAPTURE(columns);
        const TensorPtr x = random_tensor({1, rows, depth}, 1, type), weight = random_tensor({columns, depth}, 2, type);
        const TensorPtr y = result_of({2, rows, columns}, type);  // more was planned for
        CHECK(call("linear", {*x, *weight}, y) == "");
        CHECK(shape_of(y) == std::vector<SizesType>{1, rows, columns});
        CHECK(wrong_products(x, weight, y) == 0);
      }
    }
  }
}

TEST_CASE("executorch: linear with a compact matrix, few rows and many; what does not fit is refused") {
  constexpr SizesType columns = 700, depth = 96, row_bytes = depth / 32 * 112;  // work for more threads than one
  std::mt19937 random(5);
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(columns) * row_bytes);
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
  // Columns 17 and 95 of the last row are exceptions, in whose place a block has zeros.
  std::uint8_t* const last = &bytes[bytes.size() - row_bytes];
  for (const auto& [block, i] : {std::pair{last, 17}, {last + 2 * 112, 31}}) {
    block[2 * i] = block[2 * i + 1] = block[64 + i] = 0;
    block[96 + i - 16] &= 15;
  }
  std::vector<std::int32_t> first(static_cast<std::size_t>(columns) + 1, 0), column = {17, 95};
  first.back() = 2;
  std::vector<float> weights(static_cast<std::size_t>(columns) * depth);
  const std::vector<std::uint8_t> base(static_cast<std::size_t>(columns), 112);
  const std::vector<float> value = {0, -5};
  const kernels::Compact matrix{depth, bytes.data(), base.data(), first.data(), column.data(), value.data(), 2};
  kernels::widen_compact(matrix, weights.data(), 0, columns);  // kernels_tests has that it does
  const auto of = []<typename T>(const std::vector<SizesType>& shape, const std::vector<T>& elements) {
    return executorch::extension::make_tensor_ptr(shape, elements, {}, {}, et::CppTypeToScalarType<T>::value);
  };
  const TensorPtr weight = tensor({columns, depth}, weights), blocks = of({columns, row_bytes}, bytes);
  const TensorPtr bases = of({columns}, base), at = of({2}, column), values = of({2}, value);
  const auto compute = [&](const TensorPtr& x, const TensorPtr& from, const std::vector<std::int32_t>& starts,
                           const TensorPtr& y) {
    const TensorPtr of_rows = of({static_cast<SizesType>(starts.size())}, starts);
    return call("linear_compact", {*x, *from, *bases, *of_rows, *at, *values}, y);
  };
  for (const SizesType rows : {1, 2, 16, 17, 70}) {
    CAPTURE(rows);
    const TensorPtr x = random_tensor({1, rows, depth}, 1), y = result_of({2, rows, columns});
    CHECK(compute(x, blocks, first, y) == "");
    CHECK(shape_of(y) == std::vector<SizesType>{1, rows, columns});
    CHECK(wrong_products(x, weight, y) == 0);
    CHECK(compute(x, blocks, std::vector<std::int32_t>(static_cast<std::size_t>(columns) + 1), y) == "");
    CHECK(wrong_products(x, weight, y) == rows);  // without the exceptions
    // Found on a thread that is not the caller's
    std::vector<std::int32_t> wrong = first;
    wrong.back() = 3;
    CHECK(compute(x, blocks, wrong, y) == "a compact matrix: row 699 has exceptions 0 to 3 of 2");
  }
  const TensorPtr x = random_tensor({1, depth}, 1), y = result_of({1, columns});
  CHECK(compute(random_tensor({1, depth}, 1, ScalarType::Half), blocks, first, y) ==
        "nanochat_x::linear_compact: blocks and bases must be bytes, starts and columns int32, x, values and result "
        "float32");
  CHECK(compute(random_tensor({1, 64}, 1), blocks, first, y).find("x [1, 64] does not fit blocks of [700, 336]") !=
        std::string::npos);
  CHECK(compute(random_tensor({1, 95}, 1), blocks, first, y).find("x [1, 95] does not fit") != std::string::npos);
  CHECK(compute(x, of({columns * 2, row_bytes / 2}, bytes), first, y).find("blocks of [1400, 168]") !=
        std::string::npos);
  CHECK(compute(x, blocks, {0, 2}, y).find("starts [2]") != std::string::npos);
}

TEST_CASE("executorch: attention, few tokens and many, with and without a past, every dtype") {
  for (const ScalarType type : kTypes) {
    for (const Shape& s : {Shape{1, 1, 4, 2, 16, 40, 8}, {2, 3, 2, 1, 8, 20, -1}, {1, 70, 2, 2, 16, 30, 40}}) {
      for (const bool with_past : {false, true}) {
        CAPTURE(static_cast<int>(type));
        CAPTURE(s.steps);
        CAPTURE(with_past);
        const Attention a(s, type);
        CHECK(a.compute(with_past) == "");
        // Values are within 1: so is their mean. Scores are sums of `width` products below 1, halved at least.
        CHECK(a.error(with_past) <= 200 * 0x1p-24 + unit_of(type));
      }
    }
  }
}

TEST_CASE("executorch: a wrong result is seen") {
  const TensorPtr x = random_tensor({2, 32}, 1), weight = random_tensor({5, 32}, 2), y = result_of({2, 5});
  REQUIRE(call("linear", {*x, *weight}, y) == "");
  y->mutable_data_ptr<float>()[3] *= 1 + 0x1p-12F;
  CHECK(wrong_products(x, weight, y) == 1);
  Attention a({1, 20, 2, 2, 16, 30, 10}, ScalarType::Float);
  REQUIRE(a.compute(true) == "");
  a.shape.window = 11;
  CHECK(a.error(true) > 0.01);
}

TEST_CASE("executorch: linear refuses what does not fit") {
  const TensorPtr x = random_tensor({2, 8}, 1), weight = random_tensor({4, 8}, 2);
  CHECK(call("linear", {*x, *random_tensor({4, 9}, 1)}, result_of({2, 4})) ==
        "nanochat_x::linear: x [2, 8] does not fit a weight of [4, 9]");
  CHECK(call("linear", {*x, *random_tensor({4, 8}, 2, ScalarType::Half)}, result_of({2, 4})) ==
        "nanochat_x::linear: x, weight and result must have one dtype");
  CHECK(call("linear", {*x, *weight}, result_of({2, 3})) ==
        "nanochat_x::linear: the result does not fit what is planned for it, [2, 3]");
  const TensorPtr longs = integers({2, 8}, std::vector<std::int64_t>(16));
  CHECK(call("linear", {*longs, *longs}, integers({2, 2}, std::vector<std::int64_t>(4))) ==
        "nanochat_x::linear: no kernel for tensors of type 4");
}

TEST_CASE("executorch: attention refuses what does not fit") {
  const Shape shape{1, 1, 4, 2, 8, 5, -1};
  const auto with = [&](auto change) {
    Attention a(shape, ScalarType::Float);
    change(a);
    return a.compute(true);
  };
  CHECK(with([](Attention&) {}) == "");
  CHECK(with([](Attention& a) { a.position = integers({1}, {5}); }) == "");
  for (const std::int64_t position : {6, -1}) {
    CHECK(with([&](Attention& a) { a.position = integers({1}, {position}); }) ==
          "nanochat_x::attention: a position is not within the cache's 5 slots");
  }
  CHECK(with([](Attention& a) { a.position = integers({2}, {1, 1}); }) ==
        "nanochat_x::attention: position is not int64 of the batch's size, but [2]");
  CHECK(with([](Attention& a) { a.past_v = random_tensor({1, 2, 4, 8}, 1); }).find("does not fit k [1, 2, 1, 8]") !=
        std::string::npos);
  CHECK(with([](Attention& a) { a.q = random_tensor({1, 1, 3, 8}, 1); }).find("do not fit together") !=
        std::string::npos);
  CHECK(with([](Attention& a) { a.q = random_tensor({1, 1, 4, 8}, 1, ScalarType::Half); }) ==
        "nanochat_x::attention: q, k and v must have one dtype");
  CHECK(with([](Attention& a) {
          a.out = result_of({1, 1, 31});
        }).find("the result does not fit what is planned for it") != std::string::npos);
}
