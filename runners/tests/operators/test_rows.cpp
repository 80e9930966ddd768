// The row operators over libtorch's tensors, against ATen's in double. Their edges:
// runners/tests/executorch/test_rows.cpp
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/from_blob.h>
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "error_of.h"
#include "mapped_file.h"
#include "operators.h"
#include "resident.h"
#include "temp_dir.h"

using at::Tensor;
namespace operators = nanochat_x::operators;
using nanochat_x::test::error_of;

namespace {

constexpr at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16, at::kHalf};

Tensor wide(const Tensor& t) { return t.to(at::kDouble); }

Tensor random(const std::vector<std::int64_t>& shape, at::ScalarType type) { return at::randn(shape).to(type); }

// Whether `got` has its type and `exact`'s shape and is as near to it as `roundings` of float32 of numbers up to `size`
// and one of its type allow.
bool near(const Tensor& got, at::ScalarType type, const Tensor& exact, double roundings, double size) {
  if (got.scalar_type() != type || got.sizes() != exact.sizes() || !got.is_contiguous()) return false;
  const double unit = type == at::kFloat ? 0x1p-24 : type == at::kBFloat16 ? 0x1p-8 : 0x1p-11;
  // Half of float16's smallest number where it has fewer bits
  const Tensor allowed = exact.abs() * unit + (roundings * 0x1p-24 * size + 0x1p-25);
  return at::all((wide(got) - exact).abs() <= allowed).item<bool>();
}

Tensor normed(const Tensor& x, double eps) { return x * at::rsqrt(x.square().mean(-1, true) + eps); }

Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const std::vector<Tensor> halves = x.chunk(2, -1);
  return at::cat({halves[0] * cos + halves[1] * sin, halves[1] * cos - halves[0] * sin}, -1);
}

}  // namespace

TEST_CASE("operators: norm, mix, relu_square, soft_cap and heads_first, every dtype, strided arguments too") {
  at::manual_seed(1);
  for (const at::ScalarType type : kTypes) {
    for (const bool strided : {false, true}) {
      CAPTURE(static_cast<int>(type));
      CAPTURE(strided);
      const auto some = [&] {
        return strided ? random({2, 48, 3, 130}, type).transpose(1, 3) : random({2, 130, 3, 48}, type);
      };
      const Tensor x = some(), y = some();
      const double size = wide(x).abs().max().item<double>();
      CHECK(near(operators::norm(x, 1e-3), type, normed(wide(x), 1e-3), 30, std::sqrt(48.0)));
      CHECK(!near(operators::norm(x, 1e-3), type, normed(wide(x), 2e-1), 30, std::sqrt(48.0)));
      const Tensor a = at::rand({3}), b = at::rand({3});
      const Tensor mixed = wide(x) * wide(a[1]) + wide(y) * wide(b[1]);
      CHECK(near(operators::mix(x, a, y, b, 1), type, mixed, 2, 2 * size));
      CHECK(!near(operators::mix(x, a, y, b, 2), type, mixed, 2, 2 * size));
      CHECK(near(operators::relu_square(x), type, wide(x).clamp_min(0).square(), 1, size * size));
      CHECK(near(operators::soft_cap(x, 1.5), type, at::tanh(wide(x) / 1.5) * 1.5, 12, 1.5));
      CHECK(at::equal(operators::heads_first(x), x.transpose(1, 2)));
    }
  }
}

TEST_CASE("operators: rotary, with tables for each row or for all") {
  at::manual_seed(2);
  for (const at::ScalarType type : kTypes) {
    for (const std::int64_t tables : {1, 2}) {
      CAPTURE(static_cast<int>(type));
      CAPTURE(tables);
      const Tensor x = random({2, 70, 3, 32}, type), angles = at::randn({tables, 70, 1, 16});
      const Tensor cos = at::cos(angles).to(type), sin = at::sin(angles).to(type);
      const Tensor exact = normed(rotated(wide(x), wide(cos), wide(sin)), 1e-2) * 1.2;
      CHECK(near(operators::rotary(x, cos, sin, 1e-2, 1.2, false), type, exact, 40, 7));
      CHECK(near(operators::rotary(x, cos, sin, 1e-2, 1.2, true), type, exact.transpose(1, 2), 40, 7));
      CHECK(!near(operators::rotary(x, sin, cos, 1e-2, 1.2, false), type, exact, 40, 7));
    }
  }
}

TEST_CASE("operators: gate_values, with a table of any dtype") {
  at::manual_seed(3);
  for (const at::ScalarType type : kTypes) {
    for (const at::ScalarType stored : kTypes) {
      CAPTURE(static_cast<int>(type));
      CAPTURE(static_cast<int>(stored));
      const Tensor v = random({2, 30, 4, 16}, type), h = random({2, 30, 20}, type), table = random({7, 64}, stored);
      const Tensor gate = at::randn({4, 12}), ids = at::randint(0, 7, {2, 30}, at::kLong);
      const Tensor factor = at::sigmoid(at::matmul(wide(h).narrow(-1, 0, 12), wide(gate).t())) * 3;
      const Tensor exact = wide(v) + factor.unsqueeze(-1) * wide(table.index_select(0, ids.view(-1))).view(v.sizes());
      CHECK(near(operators::gate_values(v, h, gate, table, ids, 3), type, exact.transpose(1, 2), 40, 16));
      CHECK(!near(operators::gate_values(v, h, gate, table, 6 - ids, 3), type, exact.transpose(1, 2), 40, 16));
    }
  }
}

TEST_CASE("operators: gate_values reads rows of a table in a mapped file, and makes no more of it memory") {
  at::manual_seed(4);
  const nanochat_x::test::TempDir folder;
  const Tensor table = random({20000, 64}, at::kBFloat16);
  nanochat_x::test::write_file(folder / "table", {static_cast<const char*>(table.const_data_ptr()), table.nbytes()});
  const nanochat_x::internal::MappedFile file(folder / "table");
  const std::byte* const begin = file.bytes().data();
  const Tensor mapped = at::from_blob(const_cast<std::byte*>(begin), table.sizes(), table.options());
  const Tensor v = random({2, 30, 4, 16}, at::kFloat), h = random({2, 30, 20}, at::kFloat), gate = at::randn({4, 12});
  const Tensor ids = at::randint(0, 20000, {2, 30}, at::kLong);
  CHECK(
      at::equal(operators::gate_values(v, h, gate, mapped, ids, 3), operators::gate_values(v, h, gate, table, ids, 3)));
  if (!nanochat_x::test::resident_bytes(begin)) {
    MESSAGE("not all was checked: this system does not tell what is memory of a process");
    return;
  }
  CHECK(nanochat_x::test::resident_bytes(begin) == 0);
  CHECK(mapped[10000][3].item<float>() == table[10000][3].item<float>());
  CHECK(nanochat_x::test::resident_bytes(begin).value_or(0) > 0);
}

TEST_CASE("operators: rows that do not fit are refused, none are none") {
  const Tensor x = at::zeros({2, 3}), longs = at::zeros({2, 3}, at::kLong);
  CHECK(error_of([&] { operators::norm(longs, 1); }) ==
        "nanochat_x::norm: x is neither float32 nor bfloat16 nor float16");
  CHECK(error_of([&] { operators::mix(x, at::ones({2}), at::zeros({3, 2}), at::ones({2}), 0); }) ==
        "nanochat_x::mix: x [2, 3] and y [3, 2] are not alike");
  CHECK(error_of([&] { operators::heads_first(x); }) == "nanochat_x::heads_first: x is [2, 3], not [B, T, H, D]");
  CHECK(operators::norm(at::zeros({0, 4}), 1).sizes().vec() == std::vector<std::int64_t>{0, 4});
  CHECK(operators::soft_cap(at::zeros({3, 0}), 1).numel() == 0);
}
