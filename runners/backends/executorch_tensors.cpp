#include "executorch_tensors.h"

#include "rows.h"

namespace nanochat_x::executorch_operators {

std::string& last_error() {
  static thread_local std::string text;
  return text;
}

Floats::Floats(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) {
    data_ = x.const_data_ptr<float>();
    return;
  }
  copy_.resize(static_cast<std::size_t>(x.numel()));
  kernels::to_float32(x.const_data_ptr(), *kernel_type(x.scalar_type()), 0, x.numel(), copy_.data());
  data_ = copy_.data();
}

FloatResult::FloatResult(Tensor& out) : out_(out) {
  if (out.scalar_type() == ScalarType::Float) {
    data_ = out.mutable_data_ptr<float>();
  } else {
    copy_.resize(static_cast<std::size_t>(out.numel()));
    data_ = copy_.data();
  }
}

void FloatResult::store() {
  if (copy_.empty()) return;
  kernels::from_float32(data_, out_.numel(), *kernel_type(out_.scalar_type()), out_.mutable_data_ptr(), 0);
}

}  // namespace nanochat_x::executorch_operators
