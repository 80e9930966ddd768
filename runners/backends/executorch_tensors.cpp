#include "executorch_tensors.h"

#include <algorithm>

namespace nanochat_x::executorch_operators {

std::string& last_error() {
  static thread_local std::string text;
  return text;
}

Floats::Floats(const Tensor& x, std::int64_t first, std::int64_t count) {
  if (x.scalar_type() == ScalarType::Float) {
    data_ = x.const_data_ptr<float>() + first;
    return;
  }
  copy_.resize(static_cast<std::size_t>(count));
  if (x.scalar_type() == ScalarType::Half) {
    std::copy_n(x.const_data_ptr<executorch::aten::Half>() + first, count, copy_.data());
  } else {
    std::copy_n(x.const_data_ptr<executorch::aten::BFloat16>() + first, count, copy_.data());
  }
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
  if (out_.scalar_type() == ScalarType::Half) {
    std::copy_n(data_, copy_.size(), out_.mutable_data_ptr<executorch::aten::Half>());
  } else if (out_.scalar_type() == ScalarType::BFloat16) {
    std::copy_n(data_, copy_.size(), out_.mutable_data_ptr<executorch::aten::BFloat16>());
  }
}

}  // namespace nanochat_x::executorch_operators
