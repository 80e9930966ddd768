#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "calling.h"

using namespace nanochat_x::test;

namespace {

constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};

// How many results are further from `exact` than `roundings` of float32, of a number of magnitude `size`, and one of
// the result's own dtype allow.
std::int64_t wrong(const TensorPtr& got, const std::vector<double>& exact, double roundings, double size) {
  const ScalarType type = got->scalar_type();
  const double unit = type == ScalarType::Float ? 0x1p-24 : type == ScalarType::Half ? 0x1p-11 : 0x1p-8;
  const std::vector<double> values = values_of(got);
  if (values.size() != exact.size()) return -1;
  std::int64_t found = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    // Half of float16's smallest number where it has fewer bits
    found += !(std::abs(values[i] - exact[i]) <= roundings * 0x1p-24 * size + std::abs(exact[i]) * unit + 0x1p-25);
  }
  return found;
}

// What an operator computes of one element after the other.
std::vector<double> each(const TensorPtr& x, const std::function<double(double)>& function) {
  std::vector<double> values = values_of(x);
  std::ranges::transform(values, values.begin(), function);
  return values;
}

// Each row of `width` values divided by its root mean square, times scale.
void norm_rows(std::vector<double>& values, std::size_t width, double eps, double scale) {
  for (std::size_t row = 0; row < values.size(); row += width) {
    double squares = 0;
    for (std::size_t i = 0; i < width; ++i) squares += values[row + i] * values[row + i];
    const double factor = scale / std::sqrt(squares / static_cast<double>(width) + eps);
    for (std::size_t i = 0; i < width; ++i) values[row + i] *= factor;
  }
}

// [B, T, H, D] as [B, H, T, D].
std::vector<double> turned(const std::vector<double>& values, SizesType batch, SizesType steps, SizesType heads,
                           SizesType width) {
  std::vector<double> out;
  for (SizesType b = 0; b < batch; ++b) {
    for (SizesType h = 0; h < heads; ++h) {
      for (SizesType t = 0; t < steps; ++t) {
        const auto from = values.begin() + ((b * steps + t) * heads + h) * width;
        out.insert(out.end(), from, from + width);
      }
    }
  }
  return out;
}

struct Rotary {
  TensorPtr x, cos, sin;
  std::vector<double> exact(double eps, double scale) const {
    std::vector<double> values = values_of(x);
    const std::vector<double> c = values_of(cos), s = values_of(sin);
    const auto half = static_cast<std::size_t>(cos->size(3)), heads = static_cast<std::size_t>(x->size(2));
    for (std::size_t row = 0; row < values.size() / (2 * half); ++row) {
      double* v = values.data() + row * 2 * half;
      const std::size_t angles = row / heads * half % c.size();
      for (std::size_t i = 0; i < half; ++i) {
        const double a = v[i], b = v[half + i];
        v[i] = a * c[angles + i] + b * s[angles + i];
        v[half + i] = b * c[angles + i] - a * s[angles + i];
      }
    }
    norm_rows(values, 2 * half, eps, scale);
    return values;
  }
};

struct Gated {
  TensorPtr v, h, gate, table, ids;

  std::vector<double> exact(double scale) const {
    std::vector<double> values = values_of(v);
    const std::vector<double> inputs = values_of(h), weights = values_of(gate), rows = values_of(table);
    const auto heads = static_cast<std::size_t>(v->size(2)), width = static_cast<std::size_t>(v->size(3)),
               columns = static_cast<std::size_t>(h->size(2)), channels = static_cast<std::size_t>(gate->size(1));
    for (std::size_t row = 0; row < values.size() / width; ++row) {
      const std::size_t token = row / heads, head = row % heads;
      double sum = 0;
      for (std::size_t i = 0; i < channels; ++i) sum += inputs[token * columns + i] * weights[head * channels + i];
      const auto id = static_cast<std::size_t>(ids->const_data_ptr<std::int64_t>()[token]);
      for (std::size_t i = 0; i < width; ++i) {
        values[row * width + i] += scale / (1 + std::exp(-sum)) * rows[(id * heads + head) * width + i];
      }
    }
    return values;
  }
};

Gated random_gated(ScalarType type, ScalarType stored) {
  return {random_tensor({2, 3, 2, 8}, 1, type), random_tensor({2, 3, 20}, 2, type), random_tensor({2, 12}, 3),
          random_tensor({7, 16}, 4, stored), integers({2, 3}, {6, 0, 3, 3, 1, 5})};
}

}  // namespace

TEST_CASE("rows: norm") {
  for (const ScalarType type : kTypes) {
    for (const SizesType width : {1, 7, 768}) {
      CAPTURE(static_cast<int>(type));
      CAPTURE(width);
      const TensorPtr x = random_tensor({3, 40, width}, 1, type), out = result_of({4, 40, width}, type);
      CHECK(call("norm", {*x, 1e-3}, out) == "");
      CHECK(shape_of(out) == shape_of(x));
      std::vector<double> exact = values_of(x);
      norm_rows(exact, static_cast<std::size_t>(width), 1e-3, 1);
      // Of the sum, whose rounding counts half, its root, the quotient and the product; results are within sqrt(width)
      CHECK(wrong(out, exact, width / 2.0 + 6, std::sqrt(width)) == 0);
    }
  }
}

TEST_CASE("rows: mix") {
  for (const ScalarType type : kTypes) {
    const TensorPtr x = random_tensor({2, 200, 333}, 1, type), y = random_tensor({2, 200, 333}, 2, type);
    const TensorPtr a = tensor({3}, {9, 0.75F, 9}), b = tensor({3}, {9, -0.3F, 9}),
                    out = result_of({2, 200, 333}, type);
    CHECK(call("mix", {*x, *a, *y, *b, std::int64_t{1}}, out) == "");
    std::vector<double> exact = values_of(x);
    const std::vector<double> other = values_of(y);
    for (std::size_t i = 0; i < exact.size(); ++i) exact[i] = 0.75 * exact[i] + double{-0.3F} * other[i];
    CHECK(wrong(out, exact, 2, 1) == 0);
  }
}

TEST_CASE("rows: rotary, with tables for each row or for all, heads where they were or first") {
  for (const ScalarType type : kTypes) {
    for (const SizesType tables : {1, 2}) {
      for (const SizesType width : {2, 10, 128}) {
        CAPTURE(static_cast<int>(type));
        CAPTURE(tables);
        CAPTURE(width);
        const Rotary r{random_tensor({2, 5, 3, width}, 1, type), random_tensor({tables, 5, 1, width / 2}, 2, type),
                       random_tensor({tables, 5, 1, width / 2}, 3, type)};
        const std::vector<double> exact = r.exact(1e-2, 1.2);
        const double roundings = width / 2.0 + 20, size = 2 * std::sqrt(width);  // as of a norm; rotated before
        const TensorPtr out = result_of({2, 5, 3, width}, type), first = result_of({2, 3, 5, width}, type);
        CHECK(call("rotary", {*r.x, *r.cos, *r.sin, 1e-2, 1.2, false}, out) == "");
        CHECK(wrong(out, exact, roundings, size) == 0);
        CHECK(call("rotary", {*r.x, *r.cos, *r.sin, 1e-2, 1.2, true}, first) == "");
        CHECK(wrong(first, turned(exact, 2, 5, 3, width), roundings, size) == 0);
      }
    }
  }
}

TEST_CASE("rows: gate_values, with a table of any dtype") {
  for (const ScalarType type : kTypes) {
    for (const ScalarType stored : kTypes) {
      CAPTURE(static_cast<int>(type));
      CAPTURE(static_cast<int>(stored));
      const Gated g = random_gated(type, stored);
      const TensorPtr out = result_of({2, 2, 3, 8}, type);
      CHECK(call("gate_values", {*g.v, *g.h, *g.gate, *g.table, *g.ids, 3.0}, out) == "");
      CHECK(wrong(out, turned(g.exact(3), 2, 3, 2, 8), 24, 4) == 0);
    }
  }
}

TEST_CASE("rows: heads_first") {
  for (const ScalarType type : kTypes) {
    const TensorPtr x = random_tensor({2, 70, 3, 100}, 1, type), out = result_of({2, 3, 70, 100}, type);
    CHECK(call("heads_first", {*x}, out) == "");
    CHECK(values_of(out) == turned(values_of(x), 2, 70, 3, 100));
  }
}

TEST_CASE("rows: relu_square and soft_cap") {
  for (const ScalarType type : kTypes) {
    for (const SizesType count : {1, 19, 40000}) {
      CAPTURE(static_cast<int>(type));
      CAPTURE(count);
      const TensorPtr x = random_tensor({count, 1}, 1, type), out = result_of({count, 1}, type);
      CHECK(call("relu_square", {*x}, out) == "");
      CHECK(wrong(out, each(x, [](double v) { return v > 0 ? v * v : 0; }), 1, 1) == 0);
      CHECK(call("soft_cap", {*x, 0.5}, out) == "");
      // Highway's Tanh: 4 ulp at most
      CHECK(wrong(out, each(x, [](double v) { return 0.5 * std::tanh(v / 0.5); }), 12, 0.5) == 0);
    }
  }
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const TensorPtr x = tensor({5}, {nan, inf, -inf, 1e30F, -0.0F}), out = result_of({5});
  CHECK(call("soft_cap", {*x, 15.0}, out) == "");
  const std::vector<double> capped = values_of(out);
  CHECK(std::isnan(capped[0]));
  CHECK(std::vector<double>(capped.begin() + 1, capped.end()) == std::vector<double>{15, -15, 15, 0});
  CHECK(call("relu_square", {*x}, out) == "");
  CHECK(std::isnan(values_of(out)[0]));
  CHECK(values_of(out)[2] == 0);
}

TEST_CASE("rows: a wrong result is seen") {
  const TensorPtr x = random_tensor({40, 64}, 1), out = result_of({40, 64});
  REQUIRE(call("norm", {*x, 1e-3}, out) == "");
  std::vector<double> exact = values_of(x);
  norm_rows(exact, 64, 2e-3, 1);
  CHECK(wrong(out, exact, 38, 8) > 2000);
  const Gated g = random_gated(ScalarType::Float, ScalarType::Float);
  const TensorPtr gated = result_of({2, 2, 3, 8});
  REQUIRE(call("gate_values", {*g.v, *g.h, *g.gate, *g.table, *g.ids, 3.0}, gated) == "");
  CHECK(wrong(gated, g.exact(3), 24, 4) > 50);  // heads not first
  CHECK(wrong(gated, turned(g.exact(3.001), 2, 3, 2, 8), 24, 4) > 50);
}

TEST_CASE("rows: what does not fit is refused") {
  const TensorPtr x = random_tensor({2, 3}, 1), half = random_tensor({2, 3}, 1, ScalarType::Half);
  const TensorPtr scales = tensor({2}, {1, 1}), out = result_of({2, 3});
  const std::string all[] = {"norm", "relu_square", "soft_cap"};
  for (const std::string& name : all) {
    const auto with = [&](const TensorPtr& from, const TensorPtr& to) {
      return name == "relu_square" ? call(name, {*from}, to) : call(name, {*from, 1.0}, to);
    };
    CHECK(with(half, out) == "nanochat_x::" + name + ": x and the result must have one dtype");
    CHECK(with(x, result_of({2, 2})).find("the result does not fit what is planned for it") != std::string::npos);
    const TensorPtr longs = integers({2, 3}, std::vector<std::int64_t>(6));
    CHECK(with(longs, longs) == "nanochat_x::" + name + ": x is neither float32 nor bfloat16 nor float16");
  }
  const auto mix = [&](const TensorPtr& y, const TensorPtr& by, std::int64_t index) {
    return call("mix", {*x, *scales, *y, *by, index}, out);
  };
  CHECK(mix(random_tensor({3, 2}, 1), scales, 0) == "nanochat_x::mix: x [2, 3] and y [3, 2] are not alike");
  CHECK(mix(half, scales, 0) == "nanochat_x::mix: x [2, 3] and y [2, 3] are not alike");
  CHECK(mix(x, tensor({1}, {1}), 1) == "nanochat_x::mix: there is no scale 1");
  CHECK(mix(x, scales, -1) == "nanochat_x::mix: there is no scale -1");
  CHECK(mix(x, tensor({2}, {1, 1}, ScalarType::Half), 1) == "nanochat_x::mix: scales must be float32");

  const TensorPtr heads = random_tensor({2, 3, 2, 8}, 1), to = result_of({2, 3, 2, 8});
  const auto rotary = [&](const std::vector<SizesType>& shape, ScalarType type = ScalarType::Float) {
    const TensorPtr table = random_tensor(shape, 1, type);
    return call("rotary", {*heads, *table, *table, 1.0, 1.0, false}, to);
  };
  CHECK(rotary({1, 3, 1, 4}) == "");
  for (const auto& shape : {std::vector<SizesType>{3, 3, 1, 4}, {1, 2, 1, 4}, {1, 3, 2, 4}, {1, 3, 1, 3}, {3, 1, 4}}) {
    CHECK(rotary(shape).find("do not fit x [2, 3, 2, 8]") != std::string::npos);
  }
  CHECK(rotary({1, 3, 1, 4}, ScalarType::Half) == "nanochat_x::rotary: x, cos and sin must have one dtype");
  CHECK(call("heads_first", {*x}, out) == "nanochat_x::heads_first: x is [2, 3], not [B, T, H, D]");
}

TEST_CASE("rows: gate_values refuses what does not fit") {
  const auto with = [](auto change) {
    Gated g = random_gated(ScalarType::Float, ScalarType::Float);
    change(g);
    return call("gate_values", {*g.v, *g.h, *g.gate, *g.table, *g.ids, 3.0}, result_of({2, 2, 3, 8}));
  };
  const std::string name = "nanochat_x::gate_values: ", behind = " do not fit v [2, 3, 2, 8]";
  CHECK(with([](Gated&) {}) == "");
  CHECK(with([](Gated& g) { g.h = random_tensor({2, 3, 11}, 1); }) ==
        name + "h [2, 3, 11] and a gate of [2, 12]" + behind);
  CHECK(with([](Gated& g) { g.gate = random_tensor({3, 12}, 1); }) ==
        name + "h [2, 3, 20] and a gate of [3, 12]" + behind);
  CHECK(with([](Gated& g) { g.gate = random_tensor({2, 12}, 1, ScalarType::Half); }) ==
        name + "the gate must be float32");
  CHECK(with([](Gated& g) { g.table = random_tensor({7, 15}, 1); }) ==
        name + "a table of [7, 15] does not fit v [2, 3, 2, 8]");
  CHECK(with([](Gated& g) { g.ids = integers({5}, {1, 1, 1, 1, 1}); }) == name + "ids [5]" + behind);
  for (const std::int64_t id : {-1, 7}) {
    CHECK(with([&](Gated& g) { g.ids = integers({2, 3}, {0, 0, 0, id, 0, 0}); }) ==
          name + "an id is not within the table's 7 rows");
  }
}
