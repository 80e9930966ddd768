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

// x [..., depth] times a matrix of `columns` rows. `few` and `many`, for as many rows of x, write those columns of y
// that lie between two: (x, rows, y, begin, end).
template <typename Few, typename Many>
void compute_product(const char* name, const Tensor& x, std::int64_t depth, std::int64_t columns, Tensor& out,
                     const Few& few, const Many& many) {
  std::vector<SizesType> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = static_cast<SizesType>(columns);
  resize(name, out, shape);
  const std::int64_t rows = rows_of(x, depth);
  if (rows == 0) return;
  const Floats from(x);
  FloatResult to(out);
  if (rows <= kernels::kMostRows) {
    in_parallel(columns, kernels::rows_of_a_thread(depth),
                [&](std::int64_t begin, std::int64_t end) { few(from.data(), rows, to.data(), begin, end); });
  } else {
    constexpr std::int64_t kPanel = kernels::kPanelRows;
    in_parallel((columns + kPanel - 1) / kPanel, 1, [&](std::int64_t begin, std::int64_t end) {
      many(from.data(), rows, to.data(), begin * kPanel, std::min(columns, end * kPanel));
    });
  }
  to.store();
}

void compute_linear(const Tensor& x, const Tensor& weight, Tensor& out) {
  constexpr const char* kName = "linear";
  if (x.dim() < 1 || weight.dim() != 2 || x.size(x.dim() - 1) != weight.size(1)) {
    refuse(kName, "x " + shape_text(x) + " does not fit a weight of " + shape_text(weight));
  }
  if (x.scalar_type() != weight.scalar_type() || x.scalar_type() != out.scalar_type()) {
    refuse(kName, "x, weight and result must have one dtype");
  }
  const kernels::Type type = type_of(kName, weight);
  const std::int64_t depth = weight.size(1), columns = weight.size(0);
  const void* w = weight.const_data_ptr();
  compute_product(
      kName, x, depth, columns, out,
      [&](const float* from, std::int64_t rows, float* to, std::int64_t begin, std::int64_t end) {
        kernels::linear(from, rows, depth, w, type, to, columns, begin, end);
      },
      [&](const float* from, std::int64_t rows, float* to, std::int64_t begin, std::int64_t end) {
        kernels::matmul(from, rows, depth, w, type, to, columns, begin, end);
      });
}

void compute_linear_compact(const Tensor& x, const Tensor& blocks, const Tensor& bases, const Tensor& starts,
                            const Tensor& columns, const Tensor& values, Tensor& out) {
  constexpr const char* kName = "linear_compact";
  const auto all_of = [](ScalarType type, const auto&... tensors) { return ((tensors.scalar_type() == type) && ...); };
  if (!all_of(ScalarType::Byte, blocks, bases) || !all_of(ScalarType::Int, starts, columns) ||
      !all_of(ScalarType::Float, x, values, out)) {
    refuse(kName, "blocks and bases must be bytes, starts and columns int32, x, values and result float32");
  }
  const std::int64_t depth = x.dim() < 1 ? 0 : x.size(x.dim() - 1);
  const std::int64_t rows = blocks.dim() < 1 ? 0 : blocks.size(0);
  const kernels::Compact w{depth,
                           blocks.const_data_ptr<std::uint8_t>(),
                           bases.const_data_ptr<std::uint8_t>(),
                           starts.const_data_ptr<std::int32_t>(),
                           columns.const_data_ptr<std::int32_t>(),
                           values.const_data_ptr<float>(),
                           values.numel()};
  const auto is_row = [](const Tensor& t, std::int64_t size) { return t.dim() == 1 && t.size(0) == size; };
  if (depth == 0 || depth % kernels::kCompactBlock != 0 || blocks.dim() != 2 || blocks.size(1) != w.row_bytes() ||
      !is_row(bases, rows) || !is_row(starts, rows + 1) || !is_row(columns, w.exceptions) ||
      !is_row(values, w.exceptions)) {
    refuse(kName, "x " + shape_text(x) + " does not fit blocks of " + shape_text(blocks) + ", bases " +
                      shape_text(bases) + ", starts " + shape_text(starts) + ", columns " + shape_text(columns) +
                      ", values " + shape_text(values));
  }
  compute_product(
      kName, x, depth, rows, out,
      [&](const float* from, std::int64_t count, float* to, std::int64_t begin, std::int64_t end) {
        kernels::linear_compact(from, count, w, to, rows, begin, end);
      },
      [&](const float* from, std::int64_t count, float* to, std::int64_t begin, std::int64_t end) {
        kernels::matmul(from, count, w, to, rows, begin, end);
      });
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

Tensor& linear_compact(KernelRuntimeContext& context, const Tensor& x, const Tensor& blocks, const Tensor& bases,
                       const Tensor& starts, const Tensor& columns, const Tensor& values, Tensor& out) {
  return guarded(context, out, [&] { compute_linear_compact(x, blocks, bases, starts, columns, values, out); });
}

Tensor& attention(KernelRuntimeContext& context, const Tensor& q, const Tensor& k, const Tensor& v,
                  executorch::aten::optional<Tensor> past_k, executorch::aten::optional<Tensor> past_v,
                  executorch::aten::optional<Tensor> position, std::int64_t window, Tensor& out) {
  return guarded(context, out, [&] { compute_attention(q, k, v, past_k, past_v, position, window, out); });
}

}  // namespace

void add_to_registry() {
  static constexpr char kLinear[] = "nanochat_x::linear.out", kCompact[] = "nanochat_x::linear_compact.out",
                        kAttention[] = "nanochat_x::attention.out";
  using executorch::extension::make_boxed_kernel;
  static const et::Error added = [] {
    std::vector<et::Kernel> kernels = row_kernels();
    kernels.push_back(make_boxed_kernel(kLinear, EXECUTORCH_FN(linear, kLinear)));
    kernels.push_back(make_boxed_kernel(kCompact, EXECUTORCH_FN(linear_compact, kCompact)));
    kernels.push_back(make_boxed_kernel(kAttention, EXECUTORCH_FN(attention, kAttention)));
    return et::register_kernels({kernels.data(), kernels.size()});
  }();
  if (added != et::Error::Ok) throw Error("ExecuTorch did not take the operators of nanochat_x");
}

const std::vector<std::string>& names() {
  static const std::vector<std::string> all = {"attention", "gate_values", "heads_first", "linear", "linear_compact",
                                               "mix",       "norm",        "relu_square", "rotary", "soft_cap"};
  return all;
}

std::string take_error() { return std::exchange(last_error(), {}); }

}  // namespace nanochat_x::executorch_operators
