// The operators of nanochat_x/row_operators.py over ExecuTorch's tensors: runners/kernels/row_operators.h on its
// threads.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>

#include "executorch_operators.h"
#include "executorch_tensors.h"
#include "row_operators.h"

namespace nanochat_x::executorch_operators {
namespace {

using et::KernelRuntimeContext;

kernels::TensorView view(const Tensor& t) {
  return {.shape = {t.sizes().begin(), t.sizes().end()},
          .type = kernel_type(t.scalar_type()),
          .int64 = t.scalar_type() == ScalarType::Long,
          .data = t.const_data_ptr()};
}

// Computes a Call of `arguments`, tensors and numbers, into `out`.
template <typename Call, typename... Arguments>
Tensor& compute(KernelRuntimeContext& context, Tensor& out, const Arguments&... arguments) {
  return guarded(context, out, [&] {
    const auto as_argument = []<typename Argument>(const Argument& a) {
      if constexpr (std::is_same_v<Argument, Tensor>) {
        return view(a);
      } else {
        return a;
      }
    };
    const Call call(as_argument(arguments)...);
    if (kernel_type(out.scalar_type()) != call.type()) refuse(call.name(), "x and the result must have one dtype");
    resize(call.name(), out, std::vector<SizesType>(call.shape().begin(), call.shape().end()));
    void* const to = out.mutable_data_ptr();
    in_parallel(call.parts(), call.parts_of_a_thread(),
                [&](std::int64_t begin, std::int64_t end) { call.compute(begin, end, to); });
  });
}

Tensor& norm(KernelRuntimeContext& context, const Tensor& x, double eps, Tensor& out) {
  return compute<kernels::Norm>(context, out, x, eps);
}

Tensor& mix(KernelRuntimeContext& context, const Tensor& x, const Tensor& x_scales, const Tensor& y,
            const Tensor& y_scales, std::int64_t index, Tensor& out) {
  return compute<kernels::Mix>(context, out, x, x_scales, y, y_scales, index);
}

Tensor& rotary(KernelRuntimeContext& context, const Tensor& x, const Tensor& cos, const Tensor& sin, double eps,
               double scale, bool heads_first, Tensor& out) {
  return compute<kernels::Rotary>(context, out, x, cos, sin, eps, scale, heads_first);
}

Tensor& gate_values(KernelRuntimeContext& context, const Tensor& v, const Tensor& h, const Tensor& gate,
                    const Tensor& table, const Tensor& ids, double scale, Tensor& out) {
  return compute<kernels::GateValues>(context, out, v, h, gate, table, ids, scale);
}

Tensor& heads_first(KernelRuntimeContext& context, const Tensor& x, Tensor& out) {
  return compute<kernels::HeadsFirst>(context, out, x);
}

Tensor& relu_square(KernelRuntimeContext& context, const Tensor& x, Tensor& out) {
  return compute<kernels::ReluSquare>(context, out, x);
}

Tensor& soft_cap(KernelRuntimeContext& context, const Tensor& x, double cap, Tensor& out) {
  return compute<kernels::SoftCap>(context, out, x, cap);
}

// ExecuTorch keeps the pointers.
constexpr char kNorm[] = "nanochat_x::norm.out", kMix[] = "nanochat_x::mix.out", kRotary[] = "nanochat_x::rotary.out",
               kGateValues[] = "nanochat_x::gate_values.out", kHeadsFirst[] = "nanochat_x::heads_first.out",
               kReluSquare[] = "nanochat_x::relu_square.out", kSoftCap[] = "nanochat_x::soft_cap.out";

}  // namespace

std::vector<et::Kernel> row_kernels() {
  using executorch::extension::make_boxed_kernel;
  return {make_boxed_kernel(kNorm, EXECUTORCH_FN(norm, kNorm)),
          make_boxed_kernel(kMix, EXECUTORCH_FN(mix, kMix)),
          make_boxed_kernel(kRotary, EXECUTORCH_FN(rotary, kRotary)),
          make_boxed_kernel(kGateValues, EXECUTORCH_FN(gate_values, kGateValues)),
          make_boxed_kernel(kHeadsFirst, EXECUTORCH_FN(heads_first, kHeadsFirst)),
          make_boxed_kernel(kReluSquare, EXECUTORCH_FN(relu_square, kReluSquare)),
          make_boxed_kernel(kSoftCap, EXECUTORCH_FN(soft_cap, kSoftCap))};
}

}  // namespace nanochat_x::executorch_operators
