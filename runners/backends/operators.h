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

/// The same for a matrix of nanochat_x/compact.py, and x of float32: blocks uint8, bases uint8 [N],
/// starts int32 [N + 1], columns int32 and values [E].
at::Tensor linear_compact(const at::Tensor& x, const at::Tensor& blocks, const at::Tensor& bases,
                          const at::Tensor& starts, const at::Tensor& columns, const at::Tensor& values);

/// For a matrix in 8 bits, w[n, k] = weight[n, k] * scales[n, k / g]: weight int8 [N, K], scales bfloat16
/// [N, K / g], for groups of g weights, a multiple of 8 from 16 on. Computed in float32; of x in bfloat16 many rows in
/// bfloat16, and one row of 16 bits in integers (kernels.h), where the processor does so faster.
at::Tensor linear_int8(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales);

/// And in 4 bits, w[n, k] = (q[n, k] - zeros[n, k / g]) * scales[n, k / g]: weight uint8 [N, K / 2], in which byte i of
/// a group holds q of its weight i in the low half and of weight i + g / 2 in the high half; zeros uint8 [N, K / g].
at::Tensor linear_int4(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales,
                       const at::Tensor& zeros);

/// Keys and values of earlier tokens: k, v [B, H_kv, S, D]; position int64 [B], row b holding position[b] of them.
struct Past {
  at::Tensor k, v, position;
};

/// Causal attention of T new tokens over their row's past and themselves: q [B, T, H, D]; k, v [B, H_kv, T, D]. The
/// query at position p sees keys p - window .. p; a negative window is none. Returns [B, T, H * D] in q's dtype.
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<Past>& past,
                     std::int64_t window);

/// Those of nanochat_x/row_operators.py, which says what each computes, in float32 and rounded once. What does not fit
/// is nanochat_x::Error.
at::Tensor norm(const at::Tensor& x, double eps);
at::Tensor mix(const at::Tensor& x, const at::Tensor& x_scales, const at::Tensor& y, const at::Tensor& y_scales,
               std::int64_t index);
at::Tensor rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, double eps, double scale,
                  bool heads_first);
at::Tensor gate_values(const at::Tensor& v, const at::Tensor& h, const at::Tensor& gate, const at::Tensor& table,
                       const at::Tensor& ids, double scale);
at::Tensor heads_first(const at::Tensor& x);
at::Tensor relu_square(const at::Tensor& x);
at::Tensor soft_cap(const at::Tensor& x, double cap);

/// Names of all that is here, as a manifest's `operators` lists those that its programs call.
const std::vector<std::string>& names();

}  // namespace nanochat_x::operators
