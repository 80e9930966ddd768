// The operators of nanochat_x/row_operators.py over libtorch's tensors: runners/kernels/row_operators.h on its threads.

#include <ATen/ops/empty.h>

#include "mapped_file.h"
#include "operator_tensors.h"
#include "operators.h"
#include "row_operators.h"

namespace nanochat_x::operators {
namespace {

// What an operator is given, row-major.
struct Argument {
  explicit Argument(const at::Tensor& t) : tensor(t.contiguous()) {}
  operator kernels::TensorView() const {
    return {.shape = tensor.sizes().vec(),
            .type = kernel_type(tensor.scalar_type()),
            .int64 = tensor.scalar_type() == at::kLong,
            .data = tensor.const_data_ptr(),
            .read = read};
  }
  at::Tensor tensor;
  decltype(kernels::TensorView::read) read = nullptr;
};

at::Tensor compute(const kernels::RowOperator& call, const at::Tensor& x) {
  at::Tensor out = at::empty(call.shape(), x.options());
  void* const to = out.mutable_data_ptr();
  in_parallel(call.parts(), call.parts_of_a_thread(),
              [&](std::int64_t begin, std::int64_t end) { call.compute(begin, end, to); });
  return out;
}

}  // namespace

at::Tensor norm(const at::Tensor& x, double eps) {
  const Argument of(x);
  return compute(kernels::Norm(of, eps), x);
}

at::Tensor mix(const at::Tensor& x, const at::Tensor& x_scales, const at::Tensor& y, const at::Tensor& y_scales,
               std::int64_t index) {
  const Argument a(x), by(x_scales), b(y), and_by(y_scales);
  return compute(kernels::Mix(a, by, b, and_by, index), x);
}

at::Tensor rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, double eps, double scale,
                  bool heads_first) {
  const Argument of(x), c(cos), s(sin);
  return compute(kernels::Rotary(of, c, s, eps, scale, heads_first), x);
}

at::Tensor gate_values(const at::Tensor& v, const at::Tensor& h, const at::Tensor& gate, const at::Tensor& table,
                       const at::Tensor& ids, double scale) {
  const Argument values(v), inputs(h), weights(gate), of(ids);
  Argument rows(table);
  rows.read = internal::read_past_mapping;
  return compute(kernels::GateValues(values, inputs, weights, rows, of, scale), v);
}

at::Tensor heads_first(const at::Tensor& x) {
  const Argument of(x);
  return compute(kernels::HeadsFirst(of), x);
}

at::Tensor relu_square(const at::Tensor& x) {
  const Argument of(x);
  return compute(kernels::ReluSquare(of), x);
}

at::Tensor soft_cap(const at::Tensor& x, double cap) {
  const Argument of(x);
  return compute(kernels::SoftCap(of, cap), x);
}

}  // namespace nanochat_x::operators
