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

// Rows of a weight matrix that are widened at a time, for a product of many rows of x: they stay in a core's cache.
constexpr std::int64_t kWidened = 256;

// y [M, N] = x [M, K] times weight [N, K] transposed, all of x in one pass over the weights.
void multiply_few(const at::Tensor& x, const at::Tensor& weight, at::Tensor& y) {
  const std::int64_t rows = x.size(0), depth = x.size(1), columns = weight.size(0);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  const void* weights = weight.const_data_ptr();
  const kernels::Type type = type_of(weight);
  in_parallel(columns, std::max<std::int64_t>(1, kWeightsOfAThread / std::max<std::int64_t>(1, depth)),
              [&](std::int64_t begin, std::int64_t end) {
                kernels::linear(from, rows, depth, weights, type, to, columns, begin, end);
              });
}

// The same for many rows of x and weights of 16 bits: a BLAS that has no products of them is given float32, in blocks.
void multiply_widened(const at::Tensor& x, const at::Tensor& weight, at::Tensor& y) {
  const std::int64_t depth = weight.size(1), columns = weight.size(0);
  at::Tensor block = at::empty({std::min(kWidened, columns), depth}, x.options());
  for (std::int64_t begin = 0; begin < columns; begin += kWidened) {
    const std::int64_t count = std::min(kWidened, columns - begin);
    at::Tensor rows = block.narrow(0, 0, count);
    rows.copy_(weight.narrow(0, begin, count));
    at::Tensor out = y.narrow(1, begin, count);
    at::mm_out(out, x, rows.t());
  }
}

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(-1) == weight.size(1), "nanochat_x::linear: x ", x.sizes(),
              " does not fit a weight of ", weight.sizes());
  TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "nanochat_x::linear: x is ", x.scalar_type(), ", weight ",
              weight.scalar_type());
  const std::int64_t depth = weight.size(1), columns = weight.size(0);
  std::vector<std::int64_t> shape = x.sizes().vec();
  shape.back() = columns;
  const std::int64_t rows = depth == 0 ? 0 : x.numel() / depth;
  if (rows > kernels::kMostRows && x.scalar_type() == at::kFloat) return at::linear(x, weight);
  const at::Tensor from = x.contiguous().view({rows, depth}).to(at::kFloat);
  at::Tensor y = at::empty({rows, columns}, from.options());
  if (rows > kernels::kMostRows) {
    multiply_widened(from, weight, y);
  } else if (rows > 0) {
    multiply_few(from, weight.contiguous(), y);
  }
  return y.to(x.scalar_type()).view(shape);
}

const std::vector<std::string>& names() {
  static const std::vector<std::string> all = {"attention", "linear"};
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
      "attention(Tensor q, Tensor k, Tensor v, Tensor? past_k, Tensor? past_v, Tensor? position, SymInt window)"
      " -> Tensor");
}

TORCH_LIBRARY_IMPL(nanochat_x, CPU, library) {
  library.impl("linear", nanochat_x::operators::linear);
  library.impl("attention", nanochat_x::operators::registered_attention);
}
