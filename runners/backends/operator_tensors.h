#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "kernels.h"

namespace nanochat_x::operators {

/// How the kernels call a dtype, if they have it.
inline std::optional<kernels::Type> kernel_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return kernels::Type::float32;
    case at::kBFloat16:
      return kernels::Type::bfloat16;
    case at::kHalf:
      return kernels::Type::float16;
    default:
      return std::nullopt;
  }
}

/// The same; throws c10::Error for one that they do not have.
inline kernels::Type type_of(at::ScalarType type) {
  const auto found = kernel_type(type);
  TORCH_CHECK(found.has_value(), "nanochat_x has no kernel for ", type);
  return *found;
}

/// Splits [0, count) between the threads, in pieces of at least `least`; on one thread where there is less.
template <typename Function>
void in_parallel(std::int64_t count, std::int64_t least, const Function& function) {
  at::parallel_for(0, count, least, function);
}

}  // namespace nanochat_x::operators
