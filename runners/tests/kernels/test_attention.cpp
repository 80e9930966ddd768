#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention.h"
#include "error_of.h"
#include "instruction_sets.h"
#include "weights.h"

using namespace nanochat_x::test;
namespace kernels = nanochat_x::kernels;

namespace {

struct Shape {
  std::int64_t batch, steps, heads, kv_heads, width, slots, window;
};

/// Queries, keys and values; row b has `position[b]` live slots.
struct Case {
  Shape shape;
  Format format;
  std::vector<std::int64_t> position;  // none: no past
  std::vector<float> q;
  Weights k, v, past_k, past_v;

  Case(const Shape& s, Format stored, bool past)
      : shape(s),
        format(stored),
        q(random_floats(static_cast<std::size_t>(s.batch * s.steps * s.heads * s.width), 1)),
        k(random_weights(stored, s.batch * s.kv_heads * s.steps, s.width, 1, 2)),
        v(random_weights(stored, s.batch * s.kv_heads * s.steps, s.width, 1, 3)),
        past_k(random_weights(stored, std::max<std::int64_t>(1, s.batch * s.kv_heads * s.slots), s.width, 1, 4)),
        past_v(random_weights(stored, std::max<std::int64_t>(1, s.batch * s.kv_heads * s.slots), s.width, 1, 5)) {
    for (std::int64_t b = 0; past && b < s.batch; ++b) position.push_back(std::max<std::int64_t>(0, s.slots - 7 * b));
  }

  /// In `pieces` calls, as threads make them.
  std::vector<float> result(std::int64_t pieces = 1) const {
    std::vector<float> out(q.size(), std::numeric_limits<float>::quiet_NaN());
    const kernels::Attention a{.batch = shape.batch,
                               .steps = shape.steps,
                               .heads = shape.heads,
                               .kv_heads = shape.kv_heads,
                               .width = shape.width,
                               .slots = shape.slots,
                               .window = shape.window,
                               .type = type_of(format),
                               .q = q.data(),
                               .k = k.stored(),
                               .v = v.stored(),
                               .past_k = past_k.stored(),
                               .past_v = past_v.stored(),
                               .position = position.empty() ? nullptr : position.data(),
                               .out = out.data()};
    const std::int64_t parts = a.parts();
    for (std::int64_t i = 0; i < pieces; ++i) a.compute(parts * i / pieces, parts * (i + 1) / pieces);
    return out;
  }
};

/// Counts what is further from one query's attention in double than float32 allows: as of `attend`, see
/// test_attend.cpp, with one rounding more of each score, in another order.
std::int64_t wrong_of_query(const Case& c, std::int64_t b, std::int64_t t, std::int64_t h, const float* out) {
  const Shape& s = c.shape;
  const std::int64_t behind = c.position.empty() ? 0 : c.position[static_cast<std::size_t>(b)];
  const std::int64_t kv_head = h / (s.heads / s.kv_heads), row = b * s.kv_heads + kv_head;
  const float* q = c.q.data() + ((b * s.steps + t) * s.heads + h) * s.width;
  std::vector<double> scores, values(static_cast<std::size_t>(s.width)), magnitudes(values);
  std::vector<const double*> rows;
  double score_error = 0;
  for (std::int64_t at = 0; at <= behind + t; ++at) {
    if (s.window >= 0 && at < behind + t - s.window) continue;
    const std::int64_t index = at < behind ? row * s.slots + at : row * s.steps + at - behind;
    const double* key = (at < behind ? c.past_k : c.k).exact.data() + index * s.width;
    rows.push_back((at < behind ? c.past_v : c.v).exact.data() + index * s.width);
    double score = 0, magnitude = 0;
    for (std::int64_t d = 0; d < s.width; ++d) {
      score += q[d] * key[d];
      magnitude += std::abs(q[d] * key[d]);
    }
    const double scale = 1 / std::sqrt(static_cast<double>(s.width));
    scores.push_back(score * scale);
    score_error = std::max(score_error, scale * magnitude * static_cast<double>(s.width + 3) * kUnit);
  }
  const auto [least, most] = std::ranges::minmax_element(scores);
  double total = 0;
  for (const double score : scores) total += std::exp(score - *most);
  for (std::size_t j = 0; j < rows.size(); ++j) {
    const double p = std::exp(scores[j] - *most) / total;
    for (std::size_t d = 0; d < values.size(); ++d) {
      values[d] += p * rows[j][d];
      magnitudes[d] += p * std::abs(rows[j][d]);
    }
  }
  const double roundings = 2 * (*most - *least) + 5 * static_cast<double>(scores.size()) + 4;
  const double relative = 2 * (score_error + roundings * kUnit);
  std::int64_t found = 0;
  for (std::size_t d = 0; d < values.size(); ++d) found += !(std::abs(out[d] - values[d]) <= relative * magnitudes[d]);
  return found;
}

std::int64_t wrong(const Case& c, const std::vector<float>& out) {
  const Shape& s = c.shape;
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < s.batch * s.steps * s.heads; ++i) {
    found += wrong_of_query(c, i / (s.steps * s.heads), i / s.heads % s.steps, i % s.heads, out.data() + i * s.width);
  }
  return found;
}

}  // namespace

TEST_CASE("attention: few tokens and many, with and without a past, windows, ragged rows, every type") {
  with_each_instruction_set([] {
    const std::vector<Shape> shapes = {
        {1, 1, 2, 2, 16, 0, -1},   {1, 1, 4, 1, 16, 40, -1},   {3, 1, 6, 3, 32, 70, 16},   {2, 8, 4, 2, 16, 9, 5},
        {2, 9, 4, 2, 16, 30, -1},  {1, 70, 2, 1, 24, 100, 20}, {2, 130, 2, 2, 16, 5, 0},   {1, 65, 4, 4, 16, 64, 64},
        {3, 10, 3, 1, 8, 200, 3},  {1, 12, 1, 1, 1, 97, -1},   {1, 200, 1, 1, 33, 96, 95}, {1, 64, 2, 2, 128, 192, 96},
        {1, 300, 1, 1, 8, 1, 150},
    };
    for (const Format format : {Format::float32, Format::bfloat16, Format::float16}) {
      for (const Shape& s : shapes) {
        for (const bool past : {false, true}) {
          CAPTURE(name_of(format));
          CAPTURE(s.steps);
          CAPTURE(s.width);
          CAPTURE(s.slots);
          CAPTURE(s.window);
          CAPTURE(past);
          const Case c(s, format, past);
          CHECK(wrong(c, c.result()) == 0);
        }
      }
    }
  });
}

TEST_CASE("attention: the result does not depend on how the work is split") {
  for (const std::int64_t steps : {3, 150}) {
    const Case c({2, steps, 4, 2, 16, 30, 40}, Format::float32, true);
    const std::vector<float> whole = c.result();
    for (const std::int64_t pieces : {2, 3, 7}) CHECK(c.result(pieces) == whole);
  }
}

TEST_CASE("attention: scores that exp does not take overflow nothing") {
  with_each_instruction_set([] {
    Case c({1, 100, 1, 1, 16, 100, 50}, Format::float32, true);
    for (float& value : c.q) value *= 3000;
    const std::vector<float> out = c.result();
    CHECK(std::ranges::all_of(out, [](float value) { return std::isfinite(value); }));
    CHECK(wrong(c, out) == 0);
  });
}

TEST_CASE("attention: a wrong answer is seen") {
  for (const std::int64_t steps : {2, 90}) {
    Case c({1, steps, 2, 2, 16, 50, 20}, Format::float32, true);
    const std::vector<float> out = c.result();
    REQUIRE(wrong(c, out) == 0);
    c.past_v.exact[40 * 16 + 3] += 0.5;  // one value of one key of one head, which steps 0 to 10 see
    CHECK(wrong(c, out) == std::min<std::int64_t>(steps, 11));
    c.past_v.exact[40 * 16 + 3] -= 0.5;
    c.shape.window = 21;
    CHECK(wrong(c, out) > 15 * steps);
    c.shape.window = 20;
    c.position[0] -= 1;
    CHECK(wrong(c, out) > 28 * std::min<std::int64_t>(steps, 20));  // those that see the past
  }
}

TEST_CASE("attention: sizes that are none are refused") {
  const auto parts = [](const Shape& s) {
    return error_of([&] {
      const kernels::Attention a{.batch = s.batch,
                                 .steps = s.steps,
                                 .heads = s.heads,
                                 .kv_heads = s.kv_heads,
                                 .width = s.width,
                                 .slots = 0,
                                 .window = -1,
                                 .type = kernels::Type::float32,
                                 .q = nullptr,
                                 .k = nullptr,
                                 .v = nullptr,
                                 .past_k = nullptr,
                                 .past_v = nullptr,
                                 .position = nullptr,
                                 .out = nullptr};
      (void)a.parts();
    });
  };
  CHECK(parts({1, 1, 2, 1, 1, 0, -1}).empty());
  for (const Shape& s : {Shape{0, 1, 1, 1, 1, 0, -1}, {1, 0, 1, 1, 1, 0, -1}, {1, 1, 3, 2, 1, 0, -1}}) {
    CHECK(parts(s).starts_with("attention takes 1 row, token, head and column or more"));
  }
  const std::vector<float> q(65);
  std::vector<float> out(65);
  const kernels::PlacedRun run{{q.data(), q.data(), 1}, 0};
  CHECK(error_of([&] {
          kernels::attend_tokens({q.data(), 1, 65, 1, 1, 0, -1, out.data(), 1}, {&run, 1}, kernels::Type::float32);
        }) == "attention takes 1 to 64 tokens and 1 column or more at once; got 65 and 1");
}
