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
