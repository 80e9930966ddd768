#include "executorch_tensors.h"

#include <algorithm>

namespace nanochat_x::executorch_operators {
namespace {

// `count` elements from `first` on in float32: as they lie if they are, else copied to `copy`.
const float* floats(const Tensor& t, std::size_t first, std::size_t count, std::vector<float>& copy) {
  if (t.scalar_type() == ScalarType::Float) return t.const_data_ptr<float>() + first;
  copy.resize(count);
  if (t.scalar_type() == ScalarType::Half) {
    std::copy_n(t.const_data_ptr<executorch::aten::Half>() + first, count, copy.data());
  } else {
    std::copy_n(t.const_data_ptr<executorch::aten::BFloat16>() + first, count, copy.data());
  }
  return copy.data();
}

}  // namespace

std::string& last_error() {
  static thread_local std::string text;
  return text;
}

Floats::Floats(const Tensor& x) : data_(floats(x, 0, static_cast<std::size_t>(x.numel()), copy_)) {}

FloatRow::FloatRow(const Tensor& table, std::int64_t row) {
  const auto width = static_cast<std::size_t>(table.size(1));
  data_ = floats(table, static_cast<std::size_t>(row) * width, width, copy_);
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
