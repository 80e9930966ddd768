#pragma once

#include <executorch/extension/tensor/tensor_ptr_maker.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/runtime.h>

#include <random>
#include <string>
#include <vector>

#include "executorch_operators.h"

namespace nanochat_x::test {

namespace et = executorch::runtime;
using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::extension::TensorPtr;

/// A tensor of these values, rounded to `type`: float32 or one of the 16-bit types.
inline TensorPtr tensor(const std::vector<SizesType>& shape, const std::vector<float>& values,
                        ScalarType type = ScalarType::Float) {
  return executorch::extension::make_tensor_ptr(shape, values, {}, {}, type);
}

inline TensorPtr integers(const std::vector<SizesType>& shape, const std::vector<std::int64_t>& values) {
  return executorch::extension::make_tensor_ptr(shape, values);
}

inline std::size_t count_of(const std::vector<SizesType>& shape) {
  std::size_t count = 1;
  for (const SizesType size : shape) count *= static_cast<std::size_t>(size);
  return count;
}

/// Uniform in [-1, 1).
inline TensorPtr random_tensor(const std::vector<SizesType>& shape, std::uint32_t seed,
                               ScalarType type = ScalarType::Float) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(count_of(shape));
  for (float& value : values) value = uniform(generator);
  return tensor(shape, values, type);
}

/// A result of this shape at most, filled with a number that no operator returns.
inline TensorPtr result_of(const std::vector<SizesType>& shape, ScalarType type = ScalarType::Float) {
  return executorch::extension::make_tensor_ptr(shape, std::vector<float>(count_of(shape), 1234), {}, {}, type,
                                                executorch::aten::TensorShapeDynamism::DYNAMIC_BOUND);
}

/// A tensor's elements, exactly.
inline std::vector<double> values_of(const TensorPtr& t) {
  const auto count = static_cast<std::size_t>(t->numel());
  std::vector<double> values(count);
  const auto take = [&](const auto* data) {
    for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<double>(static_cast<float>(data[i]));
  };
  if (t->scalar_type() == ScalarType::Half) {
    take(t->const_data_ptr<executorch::aten::Half>());
  } else if (t->scalar_type() == ScalarType::BFloat16) {
    take(t->const_data_ptr<executorch::aten::BFloat16>());
  } else {
    take(t->const_data_ptr<float>());
  }
  return values;
}

inline std::vector<SizesType> shape_of(const TensorPtr& t) { return {t->sizes().begin(), t->sizes().end()}; }

/// Calls `nanochat_x::NAME.out` as a program does; what it says if it fails, else "".
inline std::string call(const std::string& name, std::vector<et::EValue> arguments, const TensorPtr& out) {
  et::runtime_init();
  executorch_operators::add_to_registry();
  const auto function = et::get_op_function_from_registry(("nanochat_x::" + name + ".out").c_str());
  if (!function.ok()) return "there is no operator " + name;
  arguments.emplace_back(*out);
  std::vector<et::EValue*> pointers;
  for (et::EValue& argument : arguments) pointers.push_back(&argument);
  pointers.push_back(&arguments.back());  // an operator returns its result, too
  et::KernelRuntimeContext context;
  (*function)(context, {pointers.data(), pointers.size()});
  const std::string why = executorch_operators::take_error();
  if ((context.failure_state() == et::Error::Ok) != why.empty()) return "failed without a reason";
  return why;
}

}  // namespace nanochat_x::test
