#pragma once

// What the operators need of ExecuTorch's tensors, and their threads.

#include <executorch/runtime/core/exec_aten/exec_aten.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "executorch_threads.h"
#include "kernels.h"
#include "nanochat_x/error.h"

namespace nanochat_x::executorch_operators {

namespace et = executorch::runtime;
using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;

inline std::string shape_text(const Tensor& t) {
  std::string text;
  for (const auto size : t.sizes()) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return '[' + text + ']';
}

/// Throws Error `nanochat_x::NAME: REASON`.
[[noreturn]] inline void refuse(const char* name, const std::string& reason) {
  throw Error("nanochat_x::" + std::string(name) + ": " + reason);
}

/// Why an operator failed last on this thread.
std::string& last_error();

/// Runs an operator: what it throws becomes its failure, for ExecuTorch's own code knows no exceptions.
template <typename Function>
Tensor& guarded(et::KernelRuntimeContext& context, Tensor& out, const Function& function) {
  try {
    function();
  } catch (const std::exception& error) {
    last_error() = error.what();
    context.fail(et::Error::InvalidArgument);
  }
  return out;
}

/// How the kernels call a dtype, if they have it.
inline std::optional<kernels::Type> kernel_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return kernels::Type::float32;
    case ScalarType::BFloat16:
      return kernels::Type::bfloat16;
    case ScalarType::Half:
      return kernels::Type::float16;
    default:
      return std::nullopt;
  }
}

/// The same; throws Error for one that they do not have.
inline kernels::Type type_of(const char* name, const Tensor& t) {
  const auto type = kernel_type(t.scalar_type());
  if (!type) refuse(name, "no kernel for tensors of type " + std::to_string(static_cast<int>(t.scalar_type())));
  return *type;
}

/// Gives the result its shape. Throws Error if there is no room for it.
inline void resize(const char* name, Tensor& out, std::span<const SizesType> sizes) {
  if (et::resize_tensor(out, {sizes.data(), sizes.size()}) != et::Error::Ok) {
    refuse(name, "the result does not fit what is planned for it, " + shape_text(out));
  }
}

/// Elements of x, float32 or one of the 16-bit types, in float32: as they lie if they are, else a copy.
class Floats {
 public:
  explicit Floats(const Tensor& x);
  const float* data() const { return data_; }

 private:
  std::vector<float> copy_;
  const float* data_;
};

/// Room for a float32 result that is written to `out` in its own dtype: out's memory, or a copy until `store`.
class FloatResult {
 public:
  explicit FloatResult(Tensor& out);
  float* data() { return data_; }
  void store();

 private:
  Tensor& out_;
  std::vector<float> copy_;
  float* data_;
};

/// Splits [0, count) between the threads, in pieces of at least `least`; on the caller's alone where there is less.
/// What `function` throws first is thrown again here.
template <typename Function>
void in_parallel(std::int64_t count, std::int64_t least, const Function& function) {
  const std::int64_t pieces = std::min<std::int64_t>(threads().count(), count / std::max<std::int64_t>(1, least));
  if (pieces <= 1) {
    if (count > 0) function(0, count);
    return;
  }
  std::exception_ptr error;
  std::atomic_flag failed;
  threads().run([&](int i) {
    if (i >= pieces) return;
    try {
      function(count * i / pieces, count * (i + 1) / pieces);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

/// The operators of executorch_rows.cpp, for the registry.
std::vector<et::Kernel> row_kernels();

}  // namespace nanochat_x::executorch_operators
