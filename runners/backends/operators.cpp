#include "operators.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>

#include "operator_tensors.h"

namespace nanochat_x::operators {
namespace {

// A thread is worth waking for that many weights: about 10 us of reading them.
constexpr std::int64_t kWeightsOfAThread = 1 << 15;

// Weights that are widened at a time, for a product of many rows of x: they stay in a core's cache.
constexpr std::int64_t kWidened = 1 << 18;

std::int64_t rows_of_a_thread(std::int64_t depth) {
  return std::max<std::int64_t>(1, kWeightsOfAThread / std::max<std::int64_t>(1, depth));
}

// x [M, K] times a matrix [N, K], transposed -> float32 [M, N]. Of the matrix, rows [begin, end) are
// few(x, M, y, begin, end): their products with all of x in one pass over the weights;
// widen(begin, end, out): themselves as float32. For many rows of x there is a BLAS, but none with products of them.
template <typename Few, typename Widen>
at::Tensor product(const at::Tensor& x, std::int64_t columns, const Few& few, const Widen& widen) {
  const std::int64_t rows = x.size(0), depth = x.size(1);
  at::Tensor y = at::empty({rows, columns}, x.options());
  if (rows == 0) return y;
  const float* from = x.const_data_ptr<float>();
  if (rows <= kernels::kMostRows) {
    float* to = y.mutable_data_ptr<float>();
    in_parallel(columns, rows_of_a_thread(depth),
                [&](std::int64_t begin, std::int64_t end) { few(from, rows, to, begin, end); });
    return y;
  }
  const std::int64_t most = std::clamp<std::int64_t>(kWidened / depth, 1, columns);
  const at::Tensor block = at::empty({most, depth}, x.options());
  for (std::int64_t first = 0; first < columns; first += most) {
    const std::int64_t count = std::min(most, columns - first);
    float* to = block.mutable_data_ptr<float>();
    in_parallel(count, rows_of_a_thread(depth),
                [&](std::int64_t begin, std::int64_t end) { widen(first + begin, first + end, to + begin * depth); });
    at::Tensor out = y.narrow(1, first, count);
    at::mm_out(out, x, block.narrow(0, 0, count).t());
  }
  return y;
}

// x [..., K] as contiguous float32 [M, K].
at::Tensor flat(const at::Tensor& x, std::int64_t depth) {
  return x.contiguous().view({depth == 0 ? 0 : x.numel() / depth, depth}).to(at::kFloat);
}

// y float32 [M, N] in x's dtype and leading dimensions.
at::Tensor shaped(const at::Tensor& y, const at::Tensor& x) {
  std::vector<std::int64_t> shape = x.sizes().vec();
  shape.back() = y.size(1);
  return y.to(x.scalar_type()).view(shape);
}

const std::uint16_t* bits(const at::Tensor& bfloat16) {
  return static_cast<const std::uint16_t*>(bfloat16.const_data_ptr());
}

// Sizes of a quantised matrix that fits x, whose tensors are contiguous. `values` weights in an element of `weight`.
struct Quantized {
  Quantized(const char* name, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales,
            at::ScalarType type, std::int64_t values) {
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
  std::int64_t columns, depth, group;
};

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(-1) == weight.size(1), "nanochat_x::linear: x ", x.sizes(),
              " does not fit a weight of ", weight.sizes());
  TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "nanochat_x::linear: x is ", x.scalar_type(), ", weight ",
              weight.scalar_type());
  const kernels::Type type = type_of(weight.scalar_type());
  const std::int64_t depth = weight.size(1), columns = weight.size(0);
  if (type == kernels::Type::float32 && x.numel() > kernels::kMostRows * depth) return at::linear(x, weight);
  const at::Tensor whole = weight.contiguous();
  const void* w = whole.const_data_ptr();
  const at::Tensor y = product(
      flat(x, depth), columns,
      [=](const float* from, std::int64_t rows, float* to, std::int64_t begin, std::int64_t end) {
        kernels::linear(from, rows, depth, w, type, to, columns, begin, end);
      },
      [=](std::int64_t begin, std::int64_t end, float* to) { kernels::widen(depth, w, type, to, begin, end); });
  return shaped(y, x);
}

at::Tensor linear_int8(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales) {
  const Quantized m("linear_int8", x, weight, scales, at::kChar, 1);
  const at::Tensor q = weight.contiguous(), s = scales.contiguous();
  const auto* values = q.const_data_ptr<std::int8_t>();
  const at::Tensor y = product(
      flat(x, m.depth), m.columns,
      [&](const float* from, std::int64_t rows, float* to, std::int64_t begin, std::int64_t end) {
        kernels::linear_int8(from, rows, m.depth, values, bits(s), m.group, to, m.columns, begin, end);
      },
      [&](std::int64_t begin, std::int64_t end, float* to) {
        kernels::widen_int8(m.depth, values, bits(s), m.group, to, begin, end);
      });
  return shaped(y, x);
}

at::Tensor linear_int4(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales,
                       const at::Tensor& zeros) {
  const Quantized m("linear_int4", x, weight, scales, at::kByte, 2);
  TORCH_CHECK(zeros.scalar_type() == at::kByte && zeros.sizes() == scales.sizes(),
              "nanochat_x::linear_int4: zeros are ", zeros.scalar_type(), zeros.sizes(), ", scales ", scales.sizes());
  const at::Tensor q = weight.contiguous(), s = scales.contiguous(), z = zeros.contiguous();
  const auto* values = q.const_data_ptr<std::uint8_t>();
  const auto* offsets = z.const_data_ptr<std::uint8_t>();
  const at::Tensor y = product(
      flat(x, m.depth), m.columns,
      [&](const float* from, std::int64_t rows, float* to, std::int64_t begin, std::int64_t end) {
        kernels::linear_int4(from, rows, m.depth, values, bits(s), offsets, m.group, to, m.columns, begin, end);
      },
      [&](std::int64_t begin, std::int64_t end, float* to) {
        kernels::widen_int4(m.depth, values, bits(s), offsets, m.group, to, begin, end);
      });
  return shaped(y, x);
}

const std::vector<std::string>& names() {
  static const std::vector<std::string> all = {"attention", "linear", "linear_int4", "linear_int8"};
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
  library.def("linear_int8(Tensor x, Tensor weight, Tensor scales) -> Tensor");
  library.def("linear_int4(Tensor x, Tensor weight, Tensor scales, Tensor zeros) -> Tensor");
  library.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? past_k, Tensor? past_v, Tensor? position, SymInt window)"
      " -> Tensor");
}

TORCH_LIBRARY_IMPL(nanochat_x, CPU, library) {
  library.impl("linear", nanochat_x::operators::linear);
  library.impl("linear_int8", nanochat_x::operators::linear_int8);
  library.impl("linear_int4", nanochat_x::operators::linear_int4);
  library.impl("attention", nanochat_x::operators::registered_attention);
}
