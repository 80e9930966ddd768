#include <ATen/ops/empty.h>

#include <algorithm>

#include "attention.h"
#include "operator_tensors.h"
#include "operators.h"

namespace nanochat_x::operators {
namespace {

void check_shapes(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<Past>& past) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && k.size(0) == q.size(0) &&
                  k.size(2) == q.size(1) && k.size(3) == q.size(3) && k.size(1) > 0 && q.size(2) % k.size(1) == 0,
              "nanochat_x::attention: q ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(), " do not fit together");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
              "nanochat_x::attention: q, k and v must have one dtype");
  if (!past) return;
  const auto fits = [&](const at::Tensor& t) {
    return t.dim() == 4 && t.size(0) == k.size(0) && t.size(1) == k.size(1) && t.size(3) == k.size(3) &&
           t.scalar_type() == k.scalar_type();
  };
  TORCH_CHECK(fits(past->k) && fits(past->v) && past->k.size(2) == past->v.size(2), "nanochat_x::attention: a past of ",
              past->k.sizes(), " and ", past->v.sizes(), " does not fit k ", k.sizes());
  const at::Tensor& position = past->position;
  TORCH_CHECK(position.scalar_type() == at::kLong && position.dim() == 1 && position.size(0) == q.size(0),
              "nanochat_x::attention: position is ", position.scalar_type(), position.sizes());
  const std::int64_t* at = position.const_data_ptr<std::int64_t>();
  TORCH_CHECK(std::all_of(at, at + q.size(0), [&](std::int64_t p) { return 0 <= p && p <= past->k.size(2); }),
              "nanochat_x::attention: a position is not within the cache's ", past->k.size(2), " slots");
}

}  // namespace

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<Past>& past,
                     std::int64_t window) {
  std::optional<Past> whole;
  if (past) whole = Past{past->k.contiguous(), past->v.contiguous(), past->position.contiguous()};
  check_shapes(q, k, v, whole);
  const kernels::Type type = type_of(q.scalar_type());
  const at::Tensor queries = q.contiguous().to(at::kFloat), keys = k.contiguous(), values = v.contiguous();
  at::Tensor out = at::empty(queries.sizes(), queries.options());
  const kernels::Attention call{.batch = q.size(0),
                                .steps = q.size(1),
                                .heads = q.size(2),
                                .kv_heads = k.size(1),
                                .width = q.size(3),
                                .slots = whole ? whole->k.size(2) : 0,
                                .window = window,
                                .type = type,
                                .q = queries.const_data_ptr<float>(),
                                .k = keys.const_data_ptr(),
                                .v = values.const_data_ptr(),
                                .past_k = whole ? whole->k.const_data_ptr() : nullptr,
                                .past_v = whole ? whole->v.const_data_ptr() : nullptr,
                                .position = whole ? whole->position.const_data_ptr<std::int64_t>() : nullptr,
                                .out = out.mutable_data_ptr<float>()};
  if (out.numel() > 0) {
    in_parallel(call.parts(), 1, [&](std::int64_t begin, std::int64_t end) { call.compute(begin, end); });
  }
  return out.view({call.batch, call.steps, call.heads * call.width}).to(q.scalar_type());
}

}  // namespace nanochat_x::operators
