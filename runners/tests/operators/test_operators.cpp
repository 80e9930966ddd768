#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "operators.h"

using at::Tensor;
namespace operators = nanochat_x::operators;

namespace {

// What float32 sums of `terms` products may be off by, for results and terms of about `size`: each of the additions
// rounds once (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), and a result of 16 bits once more.
double allowed(double terms, double size, at::ScalarType type) {
  const double unit = type == at::kFloat ? 0x1p-24 : type == at::kBFloat16 ? 0x1p-8 : 0x1p-11;
  return terms * 0x1p-23 * size + unit * size;
}

Tensor random(const std::vector<std::int64_t>& shape, at::ScalarType type) { return at::randn(shape).to(type); }

double largest(const Tensor& difference) { return difference.numel() ? at::abs(difference).max().item<double>() : 0; }

std::string error_of(const std::function<void()>& function) {
  try {
    function();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

struct Shape {
  std::int64_t batch, steps, heads, kv_heads, width, slots, window;
};

// softmax(q . k / sqrt(D)) v over the visible keys, in double.
Tensor reference(const Tensor& q, const Tensor& k, const Tensor& v, const operators::Past* past, std::int64_t window) {
  const Tensor qd = q.to(at::kDouble), kd = k.to(at::kDouble), vd = v.to(at::kDouble);
  const std::int64_t batch = q.size(0), steps = q.size(1), heads = q.size(2), width = q.size(3),
                     group = heads / k.size(1);
  Tensor out = at::zeros({batch, steps, heads, width}, at::kDouble);
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t position = past == nullptr ? 0 : past->position[b].item<std::int64_t>();
    for (std::int64_t t = 0; t < steps; ++t) {
      for (std::int64_t h = 0; h < heads; ++h) {
        std::vector<Tensor> keys, values;
        for (std::int64_t at = 0; at <= position + t; ++at) {
          if (window >= 0 && at < position + t - window) continue;
          const bool old = at < position;
          keys.push_back(old ? past->k[b][h / group][at].to(at::kDouble) : kd[b][h / group][at - position]);
          values.push_back(old ? past->v[b][h / group][at].to(at::kDouble) : vd[b][h / group][at - position]);
        }
        const Tensor scores = at::matmul(at::stack(keys), qd[b][t][h]) / std::sqrt(static_cast<double>(width));
        out[b][t][h] = at::matmul(at::softmax(scores, 0), at::stack(values));
      }
    }
  }
  return out.view({batch, steps, heads * width});
}

}  // namespace

TEST_CASE("operators: linear, few rows and many, every dtype") {
  at::manual_seed(1);
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const std::int64_t rows : {1, 2, 16, 17, 100}) {
      for (const auto& [columns, depth] : {std::pair{1, 1}, {7, 33}, {300, 128}, {513, 48}}) {
        CAPTURE(static_cast<int>(type));
        CAPTURE(rows);
        CAPTURE(columns);
        CAPTURE(depth);
        const Tensor x = random({rows, depth}, type), weight = random({columns, depth}, type);
        const Tensor exact = at::matmul(x.to(at::kDouble), weight.to(at::kDouble).t());
        const Tensor y = operators::linear(x, weight);
        CHECK((y.scalar_type() == type));
        CHECK(y.sizes().vec() == exact.sizes().vec());
        CHECK(largest(y.to(at::kDouble) - exact) <= allowed(depth, 4 * std::sqrt(depth) + 8, type));
      }
    }
  }
}

TEST_CASE("operators: linear keeps leading dimensions, takes strided arguments and no rows at all") {
  const Tensor x = random({3, 2, 5, 16}, at::kFloat), weight = random({16, 4}, at::kFloat).t();
  const Tensor y = operators::linear(x.transpose(0, 1), weight);
  CHECK(y.sizes().vec() == std::vector<std::int64_t>{2, 3, 5, 4});
  const Tensor exact = at::matmul(x.transpose(0, 1).to(at::kDouble), weight.to(at::kDouble).t());
  CHECK(largest(y.to(at::kDouble) - exact) <= allowed(16, 24, at::kFloat));
  CHECK(operators::linear(at::zeros({0, 16}), weight).sizes().vec() == std::vector<std::int64_t>{0, 4});
}

TEST_CASE("operators: products with a compact matrix, few rows and many; other tensors are refused") {
  at::manual_seed(4);
  constexpr std::int64_t columns = 70, depth = 96;
  // Blocks of random bytes, with exponents from 120 on, and one exception.
  const Tensor blocks = at::randint(0, 256, {columns, depth / 32, 112}, at::kByte);
  const Tensor bases = at::full({columns}, 112, at::kByte), starts = at::ones({columns + 1}, at::kInt);
  starts[0] = 0;
  blocks.select(0, 0).select(0, 0).slice(0, 6, 8).zero_();
  blocks[0][0][64 + 3] = 0;
  blocks[0][0][96 + 3].bitwise_and_(240);
  const Tensor at_3 = at::full({1}, 3, at::kInt), value = at::full({1}, 5, at::kFloat);
  const Tensor low = blocks.narrow(2, 0, 64).to(at::kInt).view({columns, depth / 32, 32, 2});
  const Tensor upper = blocks.narrow(2, 64, 32).to(at::kInt), halves = blocks.narrow(2, 96, 16).to(at::kInt);
  const Tensor exponents = at::cat({halves.bitwise_and(15), halves.bitwise_right_shift(4)}, 2) + (112 - 127);
  const Tensor mantissa = low.select(3, 0) + low.select(3, 1) * 256 + upper.bitwise_and(127) * 65536 + (1 << 23);
  const Tensor magnitude = mantissa.to(at::kDouble) * at::exp2(exponents.to(at::kDouble) - 23);
  const Tensor exact = at::where(upper.ge(128), -magnitude, magnitude).view({columns, depth});
  exact[0][3] = 5;
  const Tensor flat = blocks.view({columns, -1});
  for (const std::int64_t rows : {1, 8, 16, 17, 70}) {
    CAPTURE(rows);
    const Tensor x = random({rows, depth}, at::kFloat);
    const Tensor y = operators::linear_compact(x, flat, bases, starts, at_3, value);
    const Tensor wanted = at::matmul(x.to(at::kDouble), exact.t());
    const Tensor sums = at::matmul(x.to(at::kDouble).abs(), exact.abs().t());
    CHECK(at::all((y.to(at::kDouble) - wanted).abs() <= sums * ((depth + 4) * 0x1p-24)).item<bool>());
    CHECK(!at::all((operators::linear_compact(-x, flat, bases, starts, at_3, value).to(at::kDouble) - wanted).abs() <=
                   sums * ((depth + 4) * 0x1p-24))
               .item<bool>());
  }
  const Tensor x = random({1, depth}, at::kFloat);
  const auto error = [&](const Tensor& of_x, const Tensor& of_blocks, const Tensor& of_starts, const Tensor& values) {
    return error_of([&] { operators::linear_compact(of_x, of_blocks, bases, of_starts, at_3, values); });
  };
  CHECK(error(x.to(at::kBFloat16), flat, starts, value) == "nanochat_x::linear_compact: x is BFloat16, values Float");
  CHECK(error(x.narrow(1, 0, 95), flat, starts, value).find("does not fit blocks of [70, 336]") != std::string::npos);
  CHECK(error(x.narrow(1, 0, 64), flat, starts, value).find("does not fit blocks of [70, 336]") != std::string::npos);
  CHECK(error(x, flat, starts.narrow(0, 0, 70), value).find("starts [70]") != std::string::npos);
  CHECK(error(x, flat, starts, value.narrow(0, 0, 0)).find("values [0]") != std::string::npos);
  CHECK(error(x, flat.to(at::kInt), starts, value).find("blocks are Int") != std::string::npos);
}

TEST_CASE("operators: products with matrices in 8 and 4 bits, few rows and many, every dtype of x") {
  at::manual_seed(3);
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const std::int64_t rows : {1, 16, 17, 70}) {
      for (const auto& [columns, depth, group] : {std::tuple{5, 32, 32}, {300, 96, 16}, {40, 9600, 64}}) {
        CAPTURE(static_cast<int>(type));
        CAPTURE(rows);
        CAPTURE(columns);
        const std::int64_t groups = depth / group;
        const Tensor x = random({rows, depth}, type);
        const Tensor scales = at::randn({columns, groups}).abs().to(at::kBFloat16);
        const Tensor wide = scales.to(at::kDouble).unsqueeze(-1);
        const Tensor q8 = at::randint(-127, 128, {columns, groups, group}, at::kChar);
        const Tensor q4 = at::randint(0, 16, {columns, groups, group}, at::kByte);
        const Tensor zeros = at::randint(0, 16, {columns, groups}, at::kByte);
        const Tensor low = q4.narrow(2, 0, group / 2), high = q4.narrow(2, group / 2, group / 2);
        const Tensor exact8 = (q8.to(at::kDouble) * wide).view({columns, depth});
        const Tensor exact4 =
            ((q4.to(at::kDouble) - zeros.to(at::kDouble).unsqueeze(-1)) * wide).view({columns, depth});
        const auto check = [&](const Tensor& y, const Tensor& weights) {
          const Tensor exact = at::matmul(x.to(at::kDouble), weights.t());
          // A sum of products is off by at most a rounding an addition of the sum of their magnitudes. In 4 bits q x
          // and zero x are summed apart: magnitudes of 30 in the place of 15. Of many rows in bfloat16 the weights may
          // be rounded to it. One row of 16 bits, or many, may be rounded to integers, half a step of its group's
          // largest value at most (quantized_row.cpp).
          const Tensor sums =
              at::matmul(x.to(at::kDouble).abs(),
                         (weights.abs() + 15 * wide.expand({columns, groups, group}).reshape({columns, depth})).t());
          const Tensor most = x.to(at::kDouble).abs().view({rows, groups, group}).amax(-1, true);
          const double step = type != at::kFloat && (rows == 1 || rows > 16) ? 0.5 / 32639 + 4 * 0x1p-24 : 0;
          const Tensor integers =
              at::matmul(step * most.expand({rows, groups, group}).reshape({rows, depth}), weights.abs().t());
          const double unit = type == at::kFloat ? 0x1p-24 : type == at::kBFloat16 ? 0x1p-8 : 0x1p-11;
          const double rounded = type == at::kBFloat16 && rows > 16 ? 0x1p-9 : 0;
          CHECK((y.scalar_type() == type));
          CHECK(at::all((y.to(at::kDouble) - exact).abs() <=
                        sums * (static_cast<double>(depth) * 0x1p-24 + rounded) + integers + exact.abs() * unit)
                    .item<bool>());
        };
        check(operators::linear_int8(x, q8.view({columns, depth}), scales), exact8);
        check(operators::linear_int4(x, (low + high * 16).view({columns, depth / 2}), scales, zeros), exact4);
      }
    }
  }
}

TEST_CASE("operators: products in 8 and 4 bits of rows that no integers stand for") {
  const Tensor scales = at::ones({3, 1}, at::kBFloat16), zeros = at::zeros({3, 1}, at::kByte);
  for (const std::int64_t rows : {1, 17}) {
    Tensor x = at::ones({rows, 32}, at::kBFloat16);
    x[rows - 1][5] = std::numeric_limits<float>::infinity();
    for (const Tensor& y : {operators::linear_int8(x, at::ones({3, 32}, at::kChar), scales),
                            operators::linear_int4(x, at::full({3, 16}, 0x11, at::kByte), scales, zeros)}) {
      CHECK(at::all(at::isposinf(y[rows - 1])).item<bool>());
      CHECK(at::all(y.narrow(0, 0, rows - 1) == 32).item<bool>());
    }
  }
}

TEST_CASE("operators: attention over past and new tokens, windows, ragged rows, every dtype") {
  at::manual_seed(2);
  const std::vector<Shape> shapes = {
      {1, 1, 2, 2, 16, 0, -1},  {1, 1, 4, 1, 16, 40, -1},  {3, 1, 6, 3, 32, 70, 16},
      {2, 8, 4, 2, 16, 9, 5},   {2, 9, 4, 2, 16, 30, -1},  {1, 70, 2, 1, 24, 100, 20},
      {2, 130, 2, 2, 16, 5, 0}, {1, 65, 4, 4, 16, 64, 64}, {3, 10, 3, 1, 8, 200, 3},
  };
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const Shape& s : shapes) {
      CAPTURE(static_cast<int>(type));
      CAPTURE(s.batch);
      CAPTURE(s.steps);
      CAPTURE(s.slots);
      CAPTURE(s.window);
      const Tensor q = random({s.batch, s.steps, s.heads, s.width}, type);
      const Tensor k = random({s.batch, s.kv_heads, s.steps, s.width}, type), v = at::randn_like(k);
      operators::Past past{random({s.batch, s.kv_heads, s.slots, s.width}, type),
                           random({s.batch, s.kv_heads, s.slots, s.width}, type),
                           at::randint(s.slots + 1, {s.batch}, at::kLong)};
      past.position[0] = s.slots;
      // Scores are sums of D products, results of as many values as there are keys; values are seldom beyond 5.
      const double bound = 8 * allowed(static_cast<double>(s.width + s.slots + s.steps), 5, type);
      const Tensor out = operators::attention(q, k, v, past, s.window);
      CHECK((out.scalar_type() == type));
      CHECK(largest(out.to(at::kDouble) - reference(q, k, v, &past, s.window)) <= bound);
      const Tensor alone = operators::attention(q, k, v, std::nullopt, s.window);
      CHECK(largest(alone.to(at::kDouble) - reference(q, k, v, nullptr, s.window)) <= bound);
      if (s.slots > 0 && s.window != 0)
        CHECK(largest(out.to(at::kDouble) - alone.to(at::kDouble)) > bound);  // the past counts
    }
  }
}

TEST_CASE("operators: what lies behind the live slots has no weight") {
  const Tensor q = random({2, 12, 2, 16}, at::kFloat), k = random({2, 1, 12, 16}, at::kFloat);
  operators::Past past{random({2, 1, 20, 16}, at::kFloat), random({2, 1, 20, 16}, at::kFloat),
                       at::full({2}, 7, at::kLong)};
  for (const std::int64_t steps : {1, 12}) {
    const Tensor queries = q.narrow(1, 0, steps), keys = k.narrow(2, 0, steps);
    const Tensor before = operators::attention(queries, keys, keys, past, -1);
    operators::Past other{past.k.clone(), past.v.clone(), past.position};
    other.k.narrow(2, 7, 13).fill_(std::numeric_limits<float>::quiet_NaN());
    other.v.narrow(2, 7, 13).fill_(std::numeric_limits<float>::infinity());
    CHECK(at::equal(operators::attention(queries, keys, keys, other, -1), before));
  }
}

TEST_CASE("operators: shapes and dtypes that do not fit are refused") {
  const Tensor x = at::zeros({2, 8}), weight = at::zeros({4, 8});
  const auto holds = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(holds(error_of([&] { operators::linear(x, at::zeros({4, 9})); }), "x [2, 8] does not fit a weight of [4, 9]"));
  CHECK(holds(error_of([&] { operators::linear(x, weight.to(at::kHalf)); }), "x is Float, weight Half"));
  CHECK(holds(error_of([&] { operators::linear(x.to(at::kDouble), weight.to(at::kDouble)); }), "no kernel for Double"));
  const Tensor wide = at::zeros({2, 32}), q8 = at::zeros({4, 32}, at::kChar), grid = at::zeros({4, 2}, at::kBFloat16);
  const auto int8 = [&](const Tensor& matrix, const Tensor& scales) {
    return error_of([&] { operators::linear_int8(wide, matrix, scales); });
  };
  CHECK(int8(q8, grid).empty());
  CHECK(holds(int8(q8.narrow(1, 0, 31), grid), "x [2, 32] does not fit a weight of [4, 31]"));
  CHECK(holds(int8(q8.to(at::kByte), grid), "weight is Byte, scales BFloat16"));
  CHECK(holds(int8(q8, grid.to(at::kFloat)), "weight is Char, scales Float"));
  CHECK(holds(int8(q8, grid.narrow(0, 0, 3)), "scales [3, 2] do not fit a weight of [4, 32]"));
  CHECK(holds(int8(q8, at::zeros({4, 4}, at::kBFloat16)), "no groups of 8 weights"));
  const Tensor q4 = at::zeros({4, 16}, at::kByte);
  CHECK(holds(error_of([&] { operators::linear_int4(wide, q4, grid, at::zeros({4, 1}, at::kByte)); }),
              "zeros are Byte[4, 1]"));
  const Tensor q = at::zeros({1, 1, 4, 8}), k = at::zeros({1, 2, 1, 8});
  const auto attend = [&](const Tensor& query, const Tensor& cache, std::int64_t position) {
    return error_of([&] {
      operators::attention(query, k, k, operators::Past{cache, cache, at::full({1}, position, at::kLong)}, -1);
    });
  };
  CHECK(attend(q, at::zeros({1, 2, 5, 8}), 5).empty());
  CHECK(holds(attend(q, at::zeros({1, 2, 5, 8}), 6), "a position is not within the cache's 5 slots"));
  CHECK(holds(attend(q, at::zeros({1, 2, 5, 8}), -1), "a position is not within the cache's 5 slots"));
  CHECK(holds(attend(q, at::zeros({1, 1, 5, 8}), 1), "does not fit k [1, 2, 1, 8]"));
  CHECK(holds(attend(at::zeros({1, 1, 3, 8}), at::zeros({1, 2, 5, 8}), 1), "do not fit together"));
}
