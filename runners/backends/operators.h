#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace nanochat_x::operators {

/// The operators of nanochat_x/operators.py, computed by the kernels of runners/kernels. They are registered with
/// libtorch as `nanochat_x::NAME`, which is how TorchScript finds them; AOTInductor's programs call the C functions of
/// operators_c.cpp. Tensors are on the CPU, of float32, bfloat16 or float16; others, and shapes that do not fit, are
/// c10::Error.

/// x [..., K] times weight [N, K], transposed -> [..., N] in x's dtype. Sums are float32.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight);

/// Keys and values of earlier tokens: k, v [B, H_kv, S, D]; position int64 [B], row b holding position[b] of them.
struct Past {
  at::Tensor k, v, position;
};

/// Causal attention of T new tokens over their row's past and themselves: q [B, T, H, D]; k, v [B, H_kv, T, D]. The
/// query at position p sees keys p - window .. p; a negative window is none. Returns [B, T, H * D] in q's dtype.
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<Past>& past,
                     std::int64_t window);

/// Names of all that is here, as a manifest's `operators` lists those that its programs call.
const std::vector<std::string>& names();

}  // namespace nanochat_x::operators
