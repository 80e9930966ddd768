// The operators as C functions, under the names that AOTInductor gives to an operator's own: its programs look them up
// in the process that loads them (targets/aoti.py has the same declarations).

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <optional>

#include "operators.h"

namespace {

const at::Tensor& tensor(AtenTensorHandle handle) {
  return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle);
}

}  // namespace

// clang-format off: visible, whatever the flags: programs find them by name
#define NANOCHAT_X_EXPORT extern "C" __attribute__((visibility("default")))
// clang-format on

NANOCHAT_X_EXPORT AOTITorchError aoti_torch_cpu_linear(AtenTensorHandle x, AtenTensorHandle weight,
                                                       AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { *result = torch::aot_inductor::new_tensor_handle(nanochat_x::operators::linear(tensor(x), tensor(weight))); });
}

NANOCHAT_X_EXPORT AOTITorchError aoti_torch_cpu_linear_compact(AtenTensorHandle x, AtenTensorHandle blocks,
                                                               AtenTensorHandle bases, AtenTensorHandle starts,
                                                               AtenTensorHandle columns, AtenTensorHandle values,
                                                               AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = torch::aot_inductor::new_tensor_handle(nanochat_x::operators::linear_compact(
        tensor(x), tensor(blocks), tensor(bases), tensor(starts), tensor(columns), tensor(values)));
  });
}

NANOCHAT_X_EXPORT AOTITorchError aoti_torch_cpu_linear_int8(AtenTensorHandle x, AtenTensorHandle weight,
                                                            AtenTensorHandle scales, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = torch::aot_inductor::new_tensor_handle(
        nanochat_x::operators::linear_int8(tensor(x), tensor(weight), tensor(scales)));
  });
}

NANOCHAT_X_EXPORT AOTITorchError aoti_torch_cpu_linear_int4(AtenTensorHandle x, AtenTensorHandle weight,
                                                            AtenTensorHandle scales, AtenTensorHandle zeros,
                                                            AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = torch::aot_inductor::new_tensor_handle(
        nanochat_x::operators::linear_int4(tensor(x), tensor(weight), tensor(scales), tensor(zeros)));
  });
}

NANOCHAT_X_EXPORT AOTITorchError aoti_torch_cpu_attention(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v,
                                                          AtenTensorHandle* past_k, AtenTensorHandle* past_v,
                                                          AtenTensorHandle* position, int64_t window,
                                                          AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    std::optional<nanochat_x::operators::Past> past;
    if (past_k != nullptr && past_v != nullptr && position != nullptr) {
      past = nanochat_x::operators::Past{tensor(*past_k), tensor(*past_v), tensor(*position)};
    }
    *result = torch::aot_inductor::new_tensor_handle(
        nanochat_x::operators::attention(tensor(q), tensor(k), tensor(v), past, window));
  });
}

NANOCHAT_X_EXPORT AOTITorchError aoti_torch_cpu_norm(AtenTensorHandle x, double eps, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { *result = torch::aot_inductor::new_tensor_handle(nanochat_x::operators::norm(tensor(x), eps)); });
}

NANOCHAT_X_EXPORT AOTITorchError aoti_torch_cpu_mix(AtenTensorHandle x, AtenTensorHandle x_scales, AtenTensorHandle y,
                                                    AtenTensorHandle y_scales, int64_t index,
                                                    AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = torch::aot_inductor::new_tensor_handle(
        nanochat_x::operators::mix(tensor(x), tensor(x_scales), tensor(y), tensor(y_scales), index));
  });
}

NANOCHAT_X_EXPORT AOTITorchError aoti_torch_cpu_rotary(AtenTensorHandle x, AtenTensorHandle cos, AtenTensorHandle sin,
                                                       double eps, double scale, int32_t heads_first,
                                                       AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = torch::aot_inductor::new_tensor_handle(
        nanochat_x::operators::rotary(tensor(x), tensor(cos), tensor(sin), eps, scale, heads_first != 0));
  });
}

NANOCHAT_X_EXPORT AOTITorchError aoti_torch_cpu_gate_values(AtenTensorHandle v, AtenTensorHandle h,
                                                            AtenTensorHandle gate, AtenTensorHandle table,
                                                            AtenTensorHandle ids, double scale,
                                                            AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = torch::aot_inductor::new_tensor_handle(
        nanochat_x::operators::gate_values(tensor(v), tensor(h), tensor(gate), tensor(table), tensor(ids), scale));
  });
}

NANOCHAT_X_EXPORT AOTITorchError aoti_torch_cpu_heads_first(AtenTensorHandle x, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { *result = torch::aot_inductor::new_tensor_handle(nanochat_x::operators::heads_first(tensor(x))); });
}

NANOCHAT_X_EXPORT AOTITorchError aoti_torch_cpu_relu_square(AtenTensorHandle x, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { *result = torch::aot_inductor::new_tensor_handle(nanochat_x::operators::relu_square(tensor(x))); });
}

NANOCHAT_X_EXPORT AOTITorchError aoti_torch_cpu_soft_cap(AtenTensorHandle x, double cap, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { *result = torch::aot_inductor::new_tensor_handle(nanochat_x::operators::soft_cap(tensor(x), cap)); });
}
