// The operators of nanochat_x/operators.py over ExecuTorch's tensors: shapes checked, work split between threads.

#include "executorch_operators.h"

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "attention.h"
#include "executorch_tensors.h"
#include "split.h"

namespace nanochat_x::executorch_operators {

namespace {

using et::KernelRuntimeContext;

// x [..., K] as [M, K].
std::int64_t rows_of(const Tensor& x, std::int64_t depth) { return depth == 0 ? 0 : x.numel() / depth; }

void compute_linear(const Tensor& x, const Tensor& weight, Tensor& out) {
  constexpr const char* kName = "linear";
  if (x.dim() < 1 || weight.dim() != 2 || x.size(x.dim() - 1) != weight.size(1)) {
    refuse(kName, "x " + shape_text(x) + " does not fit a weight of " + shape_text(weight));
  }
  if (x.scalar_type() != weight.scalar_type() || x.scalar_type() != out.scalar_type()) {
    refuse(kName, "x, weight and result must have one dtype");
  }
  const kernels::Type type = type_of(kName, weight);
  std::vector<SizesType> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = static_cast<SizesType>(weight.size(0));
  resize(kName, out, shape);
  const std::int64_t depth = weight.size(1), columns = weight.size(0), rows = rows_of(x, depth);
  if (rows == 0) return;
  const Floats from(x);
  FloatResult to(out);
  const void* w = weight.const_data_ptr();
  if (rows <= kernels::kMostRows) {
    in_parallel(columns, kernels::rows_of_a_thread(depth), [&](std::int64_t begin, std::int64_t end) {
      kernels::linear(from.data(), rows, depth, w, type, to.data(), columns, begin, end);
    });
  } else {
    constexpr std::int64_t kPanel = kernels::kPanelRows;
    in_parallel((columns + kPanel - 1) / kPanel, 1, [&](std::int64_t begin, std::int64_t end) {
      kernels::matmul(from.data(), rows, depth, w, type, to.data(), columns, begin * kPanel,
                      std::min(columns, end * kPanel));
    });
  }
  to.store();
}

void check_attention(const char* name, const Tensor& q, const Tensor& k, const Tensor& v) {
  const bool fits = q.dim() == 4 && k.dim() == 4 && std::ranges::equal(k.sizes(), v.sizes()) &&
                    k.size(0) == q.size(0) && k.size(2) == q.size(1) && k.size(3) == q.size(3) && k.size(1) > 0 &&
                    q.size(2) % k.size(1) == 0;
  if (!fits) {
    refuse(name, "q " + shape_text(q) + ", k " + shape_text(k) + " and v " + shape_text(v) + " do not fit together");
  }
  if (q.scalar_type() != k.scalar_type() || q.scalar_type() != v.scalar_type()) {
    refuse(name, "q, k and v must have one dtype");
  }
}

void check_past(const char* name, const Tensor& k, const Tensor& past_k, const Tensor& past_v, const Tensor& position) {
  const auto fits = [&](const Tensor& t) {
    return t.dim() == 4 && t.size(0) == k.size(0) && t.size(1) == k.size(1) && t.size(3) == k.size(3) &&
           t.scalar_type() == k.scalar_type();
  };
  if (!fits(past_k) || !fits(past_v) || past_k.size(2) != past_v.size(2)) {
    refuse(name, "a past of " + shape_text(past_k) + " and " + shape_text(past_v) + " does not fit k " + shape_text(k));
  }
  if (position.scalar_type() != ScalarType::Long || position.dim() != 1 || position.size(0) != k.size(0)) {
    refuse(name, "position is not int64 of the batch's size, but " + shape_text(position));
  }
  const auto* at = position.const_data_ptr<std::int64_t>();
  if (!std::all_of(at, at + k.size(0), [&](std::int64_t p) { return 0 <= p && p <= past_k.size(2); })) {
    refuse(name, "a position is not within the cache's " + std::to_string(past_k.size(2)) + " slots");
  }
}

void compute_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& past_k,
                       const std::optional<Tensor>& past_v, const std::optional<Tensor>& position, std::int64_t window,
                       Tensor& out) {
  constexpr const char* kName = "attention";
  check_attention(kName, q, k, v);
  const bool past = past_k && past_v && position;
  if (past) check_past(kName, k, *past_k, *past_v, *position);
  const kernels::Type type = type_of(kName, k);
  const std::array<SizesType, 3> shape = {static_cast<SizesType>(q.size(0)), static_cast<SizesType>(q.size(1)),
                                          static_cast<SizesType>(q.size(2) * q.size(3))};
  if (out.scalar_type() != q.scalar_type()) refuse(kName, "the result must have q's dtype");
  resize(kName, out, shape);
  if (q.numel() == 0) return;
  const Floats from(q);
  FloatResult to(out);
  const kernels::Attention call{.batch = q.size(0),
                                .steps = q.size(1),
                                .heads = q.size(2),
                                .kv_heads = k.size(1),
                                .width = q.size(3),
                                .slots = past ? past_k->size(2) : 0,
                                .window = window,
                                .type = type,
                                .q = from.data(),
                                .k = k.const_data_ptr(),
                                .v = v.const_data_ptr(),
                                .past_k = past ? past_k->const_data_ptr() : nullptr,
                                .past_v = past ? past_v->const_data_ptr() : nullptr,
                                .position = past ? position->const_data_ptr<std::int64_t>() : nullptr,
                                .out = to.data()};
  in_parallel(call.parts(), 1, [&](std::int64_t begin, std::int64_t end) { call.compute(begin, end); });
  to.store();
}

Tensor& linear(KernelRuntimeContext& context, const Tensor& x, const Tensor& weight, Tensor& out) {
  return guarded(context, out, [&] { compute_linear(x, weight, out); });
}

Tensor& attention(KernelRuntimeContext& context, const Tensor& q, const Tensor& k, const Tensor& v,
                  executorch::aten::optional<Tensor> past_k, executorch::aten::optional<Tensor> past_v,
                  executorch::aten::optional<Tensor> position, std::int64_t window, Tensor& out) {
  return guarded(context, out, [&] { compute_attention(q, k, v, past_k, past_v, position, window, out); });
}

}  // namespace

void add_to_registry() {
  static constexpr char kLinear[] = "nanochat_x::linear.out", kAttention[] = "nanochat_x::attention.out";
  using executorch::extension::make_boxed_kernel;
  static const et::Error added = [] {
    std::vector<et::Kernel> kernels = row_kernels();
    kernels.push_back(make_boxed_kernel(kLinear, EXECUTORCH_FN(linear, kLinear)));
    kernels.push_back(make_boxed_kernel(kAttention, EXECUTORCH_FN(attention, kAttention)));
    return et::register_kernels({kernels.data(), kernels.size()});
  }();
  if (added != et::Error::Ok) throw Error("ExecuTorch did not take the operators of nanochat_x");
}

const std::vector<std::string>& names() {
  static const std::vector<std::string> all = {"attention", "gate_values", "heads_first", "linear",  "mix",
                                               "norm",      "relu_square", "rotary",      "soft_cap"};
  return all;
}

std::string take_error() { return std::exchange(last_error(), {}); }

}  // namespace nanochat_x::executorch_operators
