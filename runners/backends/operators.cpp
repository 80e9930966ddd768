#include "operators.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "nanochat_x/bundle.h"
#include "operator_tensors.h"
#include "split.h"

namespace nanochat_x::operators {
namespace {

// Weights that are widened at a time, for a product of many rows of x: they stay in a core's cache. Rows of them in
// multiples of that are what a BLAS splits evenly between its threads.
constexpr std::int64_t kWidened = 1 << 18;
constexpr std::int64_t kEvenRows = 128;

const std::uint16_t* bits_of(const at::Tensor& bfloat16) {
  return static_cast<const std::uint16_t*>(bfloat16.const_data_ptr());
}

// x [M, K] times a quantised matrix [N, K], transposed, for many rows of x, by a BLAS. widen(begin, end, out): rows
// [begin, end) of the matrix in x's dtype.
template <typename Element, typename Widen>
at::Tensor widened_product(const at::Tensor& x, std::int64_t columns, const Widen& widen) {
  const std::int64_t depth = x.size(1);
  at::Tensor y = at::empty({x.size(0), columns}, x.options());
  const std::int64_t most = std::min(columns, std::max<std::int64_t>(1, kWidened / depth / kEvenRows) * kEvenRows);
  const at::Tensor block = at::empty({most, depth}, x.options());
  auto* to = static_cast<Element*>(block.mutable_data_ptr());
  for (std::int64_t first = 0; first < columns; first += most) {
    const std::int64_t count = std::min(most, columns - first);
    in_parallel(count, kernels::rows_of_a_thread(depth),
                [&](std::int64_t begin, std::int64_t end) { widen(first + begin, first + end, to + begin * depth); });
    at::Tensor out = y.narrow(1, first, count);
    at::mm_out(out, x, block.narrow(0, 0, count).t());
  }
  return y;
}

// A float32 y [rows, columns], filled in by threads: work(y, begin, end) computes its columns [begin, end).
template <typename Work>
at::Tensor by_columns(const at::Tensor& x, std::int64_t columns, const Work& work) {
  at::Tensor y = at::empty({x.size(0), columns}, x.options().dtype(at::kFloat));
  if (x.size(0) == 0) return y;
  float* to = y.mutable_data_ptr<float>();
  in_parallel(columns, kernels::rows_of_a_thread(x.size(1)),
              [&](std::int64_t begin, std::int64_t end) { work(to, begin, end); });
  return y;
}

// x [M, K] times a matrix [N, K], transposed, for up to kMostRows rows of x, in one pass over the weights and in
// float32. few(x, M, y, begin, end): the products of all of x with rows [begin, end) of the matrix.
template <typename Few>
at::Tensor product_of_few(const at::Tensor& x, std::int64_t columns, const Few& few) {
  const at::Tensor wide = x.to(at::kFloat);
  return by_columns(wide, columns, [&](float* to, std::int64_t begin, std::int64_t end) {
    few(wide.const_data_ptr<float>(), wide.size(0), to, begin, end);
  });
}

// A float32 y [rows, columns] as by_columns, split where kernels::matmul rearranges weights.
template <typename Work>
at::Tensor by_panels(const at::Tensor& x, std::int64_t columns, const Work& work) {
  at::Tensor y = at::empty({x.size(0), columns}, x.options().dtype(at::kFloat));
  float* to = y.mutable_data_ptr<float>();
  constexpr std::int64_t kPanel = kernels::kPanelRows;
  in_parallel((columns + kPanel - 1) / kPanel, 1,
              [&](std::int64_t begin, std::int64_t end) { work(to, begin * kPanel, std::min(columns, end * kPanel)); });
  return y;
}

// x [M, K] times a matrix [N, K], transposed, for many rows of x, in float32. many(x, M, y, begin, end): the products
// of all of x with rows [begin, end) of the matrix, by kernels::matmul.
template <typename Many>
at::Tensor product_of_many(const at::Tensor& x, std::int64_t columns, const Many& many) {
  const at::Tensor wide = x.to(at::kFloat);
  return by_panels(wide, columns, [&](float* to, std::int64_t begin, std::int64_t end) {
    many(wide.const_data_ptr<float>(), wide.size(0), to, begin, end);
  });
}

// Whether libtorch multiplies many rows of bfloat16 faster than kernels::matmul does in float32, and integers.
enum class Bfloat16 { slower, faster, by_amx };

Bfloat16 many_rows_of_bfloat16() {
  static const Bfloat16 speed = !kernels::multiplies_bfloat16()         ? Bfloat16::slower
                                : cpu_has_feature("amx_bf16")           ? Bfloat16::by_amx
                                : kernels::multiplies_bfloat16_faster() ? Bfloat16::faster
                                                                        : Bfloat16::slower;
  return speed;
}

// The same for up to kMostRows rows of bfloat16, without widening it.
at::Tensor product_of_bfloat16(const at::Tensor& x, const at::Tensor& weight) {
  const std::int64_t columns = weight.size(0);
  return by_columns(x, columns, [&](float* to, std::int64_t begin, std::int64_t end) {
    kernels::linear_bfloat16(bits_of(x), x.size(0), x.size(1), bits_of(weight), to, columns, begin, end);
  });
}

// x [..., K] as contiguous [M, K].
at::Tensor flat(const at::Tensor& x, std::int64_t depth) {
  return x.contiguous().view({depth == 0 ? 0 : x.numel() / depth, depth});
}

// y [M, N] in x's dtype and leading dimensions.
at::Tensor shaped(const at::Tensor& y, const at::Tensor& x) {
  std::vector<std::int64_t> shape = x.sizes().vec();
  shape.back() = y.size(1);
  return y.to(x.scalar_type()).view(shape);
}

// A compact matrix that fits x, and its tensors, contiguous.
struct CompactMatrix {
  CompactMatrix(const at::Tensor& x, const at::Tensor& blocks, const at::Tensor& bases, const at::Tensor& starts,
                const at::Tensor& columns, const at::Tensor& values)
      : tensors{blocks.contiguous(), bases.contiguous(), starts.contiguous(), columns.contiguous(),
                values.contiguous()} {
    TORCH_CHECK(blocks.scalar_type() == at::kByte && bases.scalar_type() == at::kByte &&
                    starts.scalar_type() == at::kInt && columns.scalar_type() == at::kInt,
                "nanochat_x::linear_compact: blocks are ", blocks.scalar_type(), ", bases ", bases.scalar_type(),
                ", starts ", starts.scalar_type(), ", columns ", columns.scalar_type());
    TORCH_CHECK(x.scalar_type() == at::kFloat && values.scalar_type() == at::kFloat,
                "nanochat_x::linear_compact: x is ", x.scalar_type(), ", values ", values.scalar_type());
    TORCH_CHECK(x.dim() >= 1 && blocks.dim() == 2 && x.size(-1) % kernels::kCompactBlock == 0,
                "nanochat_x::linear_compact: x ", x.sizes(), " does not fit blocks of ", blocks.sizes());
    rows = blocks.size(0);
    matrix.K = x.size(-1);
    TORCH_CHECK(blocks.size(1) == matrix.row_bytes() && bases.sizes() == at::IntArrayRef{rows} &&
                    starts.sizes() == at::IntArrayRef{rows + 1} && columns.dim() == 1 &&
                    columns.sizes() == values.sizes(),
                "nanochat_x::linear_compact: x ", x.sizes(), " does not fit blocks of ", blocks.sizes(), ", bases ",
                bases.sizes(), ", starts ", starts.sizes(), ", columns ", columns.sizes(), ", values ", values.sizes());
    matrix.blocks = tensors[0].const_data_ptr<std::uint8_t>();
    matrix.bases = tensors[1].const_data_ptr<std::uint8_t>();
    matrix.starts = tensors[2].const_data_ptr<std::int32_t>();
    matrix.columns = tensors[3].const_data_ptr<std::int32_t>();
    matrix.values = tensors[4].const_data_ptr<float>();
    matrix.exceptions = columns.size(0);
  }

  at::Tensor tensors[5];
  kernels::Compact matrix{};
  std::int64_t rows;
};

// Sizes of a quantised matrix that fits x, whose tensors are contiguous. `values` weights in an element of `weight`.
struct Quantized {
  Quantized(const char* name, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales,
            at::ScalarType type, std::int64_t values)
      : bits(static_cast<int>(8 / values)) {
    (void)type_of(x.scalar_type());
    TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(-1) == values * weight.size(1), "nanochat_x::", name,
                ": x ", x.sizes(), " does not fit a weight of ", weight.sizes());
    TORCH_CHECK(weight.scalar_type() == type && scales.scalar_type() == at::kBFloat16, "nanochat_x::", name,
                ": weight is ", weight.scalar_type(), ", scales ", scales.scalar_type());
    columns = weight.size(0);
    depth = x.size(-1);
    TORCH_CHECK(scales.dim() == 2 && scales.size(0) == columns && scales.size(1) > 0 && depth % scales.size(1) == 0,
                "nanochat_x::", name, ": scales ", scales.sizes(), " do not fit a weight of ", weight.sizes());
    group = depth / scales.size(1);
    TORCH_CHECK(group >= 16 && group % 8 == 0, "nanochat_x::", name, ": no groups of ", group, " weights");
  }
  int bits;
  std::int64_t columns, depth, group;
};

// One row of x of 16 bits, [1, K], times a quantised matrix, by integers where there are products of them and x is
// finite; else an undefined tensor. one(row, y, begin, end): the products of the row with rows [begin, end).
template <typename One>
at::Tensor product_of_one(const at::Tensor& x, const Quantized& m, const One& one) {
  if (x.size(0) != 1 || x.scalar_type() == at::kFloat) return {};
  const auto layout = kernels::QuantizedRow::best(m.bits, m.group);
  if (!layout) return {};
  const at::Tensor wide = x.to(at::kFloat);
  const kernels::QuantizedRow row(wide.const_data_ptr<float>(), m.depth, m.group, m.bits, *layout);
  if (!row.finite()) return {};
  return by_columns(wide, m.columns,
                    [&](float* to, std::int64_t begin, std::int64_t end) { one(row, to, begin, end); });
}

// The same for many rows. many(rows, y, begin, end): the products of all of them.
template <typename Many>
at::Tensor product_of_integers(const at::Tensor& x, const Quantized& m, const Many& many) {
  if (x.scalar_type() == at::kFloat || !kernels::QuantizedRows::takes(m.group)) return {};
  const at::Tensor wide = x.to(at::kFloat);
  const auto* from = wide.const_data_ptr<float>();
  const std::int64_t M = wide.size(0);
  kernels::QuantizedRows rows(M, m.depth, m.group);
  constexpr std::int64_t kTogether = kernels::QuantizedRows::kTogether;
  std::atomic<bool> finite = true;
  in_parallel((M + kTogether - 1) / kTogether, 1, [&](std::int64_t begin, std::int64_t end) {
    if (!rows.quantize(from, begin * kTogether, std::min(M, end * kTogether))) finite = false;
  });
  if (!finite) return {};
  return by_panels(wide, m.columns,
                   [&](float* to, std::int64_t begin, std::int64_t end) { many(rows, to, begin, end); });
}

// A quantised matrix times x [..., K]. `one`, `few` and `many` as above; widen(begin, end, out) for out of float and of
// bfloat16's bits.
template <typename One, typename Few, typename Many, typename Widen>
at::Tensor quantized_product(const at::Tensor& x, const Quantized& m, const One& one, const Few& few, const Many& many,
                             const Widen& widen) {
  const at::Tensor rows = flat(x, m.depth);
  if (const at::Tensor y = product_of_one(rows, m, one); y.defined()) return shaped(y, x);
  if (rows.size(0) <= kernels::kMostRows) return shaped(product_of_few(rows, m.columns, few), x);
  const bool bfloat16 = x.scalar_type() == at::kBFloat16;
  if (!bfloat16 || many_rows_of_bfloat16() != Bfloat16::by_amx) {
    if (const at::Tensor y = product_of_integers(rows, m, many); y.defined()) return shaped(y, x);
  }
  if (bfloat16 && many_rows_of_bfloat16() != Bfloat16::slower) {
    return shaped(widened_product<std::uint16_t>(rows, m.columns, widen), x);
  }
  return shaped(widened_product<float>(rows.to(at::kFloat), m.columns, widen), x);
}

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(-1) == weight.size(1), "nanochat_x::linear: x ", x.sizes(),
              " does not fit a weight of ", weight.sizes());
  TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "nanochat_x::linear: x is ", x.scalar_type(), ", weight ",
              weight.scalar_type());
  const kernels::Type type = type_of(weight.scalar_type());
  const std::int64_t depth = weight.size(1), columns = weight.size(0);
  const at::Tensor rows = flat(x, depth), whole = weight.contiguous();
  const void* w = whole.const_data_ptr();
  const bool bfloat16 = type == kernels::Type::bfloat16;
  if (rows.size(0) <= kernels::kMostRows) {
    if (bfloat16 && kernels::multiplies_bfloat16()) return shaped(product_of_bfloat16(rows, whole), x);
    const auto few = [=](const float* from, std::int64_t count, float* to, std::int64_t begin, std::int64_t end) {
      kernels::linear(from, count, depth, w, type, to, columns, begin, end);
    };
    return shaped(product_of_few(rows, columns, few), x);
  }
  if (bfloat16 && many_rows_of_bfloat16() != Bfloat16::slower) return at::linear(x, weight);
  const auto many = [=](const float* from, std::int64_t count, float* to, std::int64_t begin, std::int64_t end) {
    kernels::matmul(from, count, depth, w, type, to, columns, begin, end);
  };
  return shaped(product_of_many(rows, columns, many), x);
}

at::Tensor linear_compact(const at::Tensor& x, const at::Tensor& blocks, const at::Tensor& bases,
                          const at::Tensor& starts, const at::Tensor& columns, const at::Tensor& values) {
  const CompactMatrix m(x, blocks, bases, starts, columns, values);
  const at::Tensor rows = flat(x, m.matrix.K);
  if (rows.size(0) <= kernels::kMostRows) {
    const auto few = [&](const float* from, std::int64_t count, float* to, std::int64_t begin, std::int64_t end) {
      kernels::linear_compact(from, count, m.matrix, to, m.rows, begin, end);
    };
    return shaped(product_of_few(rows, m.rows, few), x);
  }
  const auto many = [&](const float* from, std::int64_t count, float* to, std::int64_t begin, std::int64_t end) {
    kernels::matmul(from, count, m.matrix, to, m.rows, begin, end);
  };
  return shaped(product_of_many(rows, m.rows, many), x);
}

at::Tensor linear_int8(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales) {
  const Quantized m("linear_int8", x, weight, scales, at::kChar, 1);
  const at::Tensor q = weight.contiguous(), s = scales.contiguous();
  const auto* values = q.const_data_ptr<std::int8_t>();
  return quantized_product(
      x, m,
      [&](const kernels::QuantizedRow& row, float* to, std::int64_t begin, std::int64_t end) {
        kernels::linear_int8(row, values, bits_of(s), to, begin, end);
      },
      [&](const float* from, std::int64_t rows, float* to, std::int64_t begin, std::int64_t end) {
        kernels::linear_int8(from, rows, m.depth, values, bits_of(s), m.group, to, m.columns, begin, end);
      },
      [&](const kernels::QuantizedRows& many, float* to, std::int64_t begin, std::int64_t end) {
        kernels::matmul_int8(many, values, bits_of(s), to, m.columns, begin, end);
      },
      [&](std::int64_t begin, std::int64_t end, auto* to) {
        kernels::widen_int8(m.depth, values, bits_of(s), m.group, to, begin, end);
      });
}

at::Tensor linear_int4(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales,
                       const at::Tensor& zeros) {
  const Quantized m("linear_int4", x, weight, scales, at::kByte, 2);
  TORCH_CHECK(zeros.scalar_type() == at::kByte && zeros.sizes() == scales.sizes(),
              "nanochat_x::linear_int4: zeros are ", zeros.scalar_type(), zeros.sizes(), ", scales ", scales.sizes());
  const at::Tensor q = weight.contiguous(), s = scales.contiguous(), z = zeros.contiguous();
  const auto* values = q.const_data_ptr<std::uint8_t>();
  const auto* offsets = z.const_data_ptr<std::uint8_t>();
  return quantized_product(
      x, m,
      [&](const kernels::QuantizedRow& row, float* to, std::int64_t begin, std::int64_t end) {
        kernels::linear_int4(row, values, bits_of(s), offsets, to, begin, end);
      },
      [&](const float* from, std::int64_t rows, float* to, std::int64_t begin, std::int64_t end) {
        kernels::linear_int4(from, rows, m.depth, values, bits_of(s), offsets, m.group, to, m.columns, begin, end);
      },
      [&](const kernels::QuantizedRows& many, float* to, std::int64_t begin, std::int64_t end) {
        kernels::matmul_int4(many, values, bits_of(s), offsets, to, m.columns, begin, end);
      },
      [&](std::int64_t begin, std::int64_t end, auto* to) {
        kernels::widen_int4(m.depth, values, bits_of(s), offsets, m.group, to, begin, end);
      });
}

const std::vector<std::string>& names() {
  static const std::vector<std::string> all = {"attention",      "gate_values", "heads_first", "linear",
                                               "linear_compact", "linear_int4", "linear_int8", "mix",
                                               "norm",           "relu_square", "rotary",      "soft_cap"};
  return all;
}

namespace {

at::Tensor registered_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const std::optional<at::Tensor>& past_k, const std::optional<at::Tensor>& past_v,
                                const std::optional<at::Tensor>& position, std::int64_t window) {
  std::optional<Past> past;
  if (past_k && past_v && position) past = Past{*past_k, *past_v, *position};
  return attention(q, k, v, past, window);
}

}  // namespace
}  // namespace nanochat_x::operators

TORCH_LIBRARY(nanochat_x, library) {
  library.def("linear(Tensor x, Tensor weight) -> Tensor");
  library.def(
      "linear_compact(Tensor x, Tensor blocks, Tensor bases, Tensor starts, Tensor columns, Tensor values) -> Tensor");
  library.def("linear_int8(Tensor x, Tensor weight, Tensor scales) -> Tensor");
  library.def("linear_int4(Tensor x, Tensor weight, Tensor scales, Tensor zeros) -> Tensor");
  library.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? past_k, Tensor? past_v, Tensor? position, SymInt window)"
      " -> Tensor");
  library.def("norm(Tensor x, float eps) -> Tensor");
  library.def("mix(Tensor x, Tensor x_scales, Tensor y, Tensor y_scales, int index) -> Tensor");
  library.def("rotary(Tensor x, Tensor cos, Tensor sin, float eps, float scale, bool heads_first) -> Tensor");
  library.def("gate_values(Tensor v, Tensor h, Tensor gate, Tensor table, Tensor ids, float scale) -> Tensor");
  library.def("heads_first(Tensor x) -> Tensor");
  library.def("relu_square(Tensor x) -> Tensor");
  library.def("soft_cap(Tensor x, float cap) -> Tensor");
}

TORCH_LIBRARY_IMPL(nanochat_x, CPU, library) {
  library.impl("linear", nanochat_x::operators::linear);
  library.impl("linear_compact", nanochat_x::operators::linear_compact);
  library.impl("linear_int8", nanochat_x::operators::linear_int8);
  library.impl("linear_int4", nanochat_x::operators::linear_int4);
  library.impl("attention", nanochat_x::operators::registered_attention);
  library.impl("norm", nanochat_x::operators::norm);
  library.impl("mix", nanochat_x::operators::mix);
  library.impl("rotary", nanochat_x::operators::rotary);
  library.impl("gate_values", nanochat_x::operators::gate_values);
  library.impl("heads_first", nanochat_x::operators::heads_first);
  library.impl("relu_square", nanochat_x::operators::relu_square);
  library.impl("soft_cap", nanochat_x::operators::soft_cap);
}
