// The operators of nanochat_x/row_operators.py over ExecuTorch's tensors: shapes checked, rows split between threads.

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

#include "executorch_operators.h"
#include "executorch_tensors.h"
#include "rows.h"

namespace nanochat_x::executorch_operators {
namespace {

using et::KernelRuntimeContext;

// A thread is worth waking for that many values: about 5 us of work on them.
constexpr std::int64_t kValuesOfAThread = 1 << 14;

// function(row) for each of some rows of `width` values.
template <typename Function>
void for_rows(std::int64_t rows, std::int64_t width, const Function& function) {
  in_parallel(rows, std::max<std::int64_t>(1, kValuesOfAThread / width), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) function(row);
  });
}

// function(begin, count) for pieces of `count` values.
template <typename Function>
void for_values(std::int64_t count, const Function& function) {
  in_parallel(count, kValuesOfAThread, [&](std::int64_t begin, std::int64_t end) { function(begin, end - begin); });
}

// Gives the result its shape. It must have x's dtype, which must be one that the kernels take.
void prepare(const char* name, const Tensor& x, std::span<const SizesType> shape, Tensor& out) {
  (void)type_of(name, x);
  if (x.scalar_type() != out.scalar_type()) refuse(name, "x and the result must have one dtype");
  resize(name, out, shape);
}

void prepare(const char* name, const Tensor& x, Tensor& out) {
  prepare(name, x, {x.sizes().data(), x.sizes().size()}, out);
}

const float* float_data(const char* name, const char* what, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float) refuse(name, std::string(what) + " must be float32");
  return t.const_data_ptr<float>();
}

Tensor& norm(KernelRuntimeContext& context, const Tensor& x, double eps, Tensor& out) {
  return guarded(context, out, [&] {
    if (x.dim() < 1) refuse("norm", "x has no dimension");
    prepare("norm", x, out);
    if (x.numel() == 0) return;
    const std::int64_t width = x.size(x.dim() - 1);
    const Floats from(x);
    FloatResult to(out);
    for_rows(x.numel() / width, width, [&](std::int64_t row) {
      kernels::norm(from.data() + row * width, width, static_cast<float>(eps), 1, to.data() + row * width);
    });
    to.store();
  });
}

Tensor& mix(KernelRuntimeContext& context, const Tensor& x, const Tensor& x_scales, const Tensor& y,
            const Tensor& y_scales, std::int64_t index, Tensor& out) {
  return guarded(context, out, [&] {
    if (!std::ranges::equal(x.sizes(), y.sizes()) || x.scalar_type() != y.scalar_type()) {
      refuse("mix", "x " + shape_text(x) + " and y " + shape_text(y) + " are not alike");
    }
    if (index < 0 || index >= x_scales.numel() || index >= y_scales.numel()) {
      refuse("mix", "there is no scale " + std::to_string(index));
    }
    const float a = float_data("mix", "scales", x_scales)[index], b = float_data("mix", "scales", y_scales)[index];
    prepare("mix", x, out);
    const Floats first(x), second(y);
    FloatResult to(out);
    for_values(x.numel(), [&](std::int64_t begin, std::int64_t count) {
      kernels::mix(first.data() + begin, a, second.data() + begin, b, count, to.data() + begin);
    });
    to.store();
  });
}

// Sizes of x [B, T, H, D].
struct Heads {
  Heads(const char* name, const Tensor& x) {
    if (x.dim() != 4 || x.numel() == 0) refuse(name, "x is " + shape_text(x) + ", not [B, T, H, D]");
    batch = x.size(0);
    steps = x.size(1);
    heads = x.size(2);
    width = x.size(3);
  }
  std::int64_t batch, steps, heads, width;

  std::int64_t rows() const { return batch * steps * heads; }
  std::array<SizesType, 4> heads_first() const {
    return {static_cast<SizesType>(batch), static_cast<SizesType>(heads), static_cast<SizesType>(steps),
            static_cast<SizesType>(width)};
  }
  // Where row [b, t, h] is with heads first, [b, h, t].
  std::int64_t row_of(std::int64_t row) const {
    const std::int64_t h = row % heads, t = row / heads % steps, b = row / heads / steps;
    return (b * heads + h) * steps + t;
  }
};

Tensor& rotary(KernelRuntimeContext& context, const Tensor& x, const Tensor& cos, const Tensor& sin, double eps,
               double scale, bool heads_first, Tensor& out) {
  return guarded(context, out, [&] {
    const Heads s("rotary", x);
    const bool fits = cos.dim() == 4 && std::ranges::equal(cos.sizes(), sin.sizes()) &&
                      (cos.size(0) == 1 || cos.size(0) == s.batch) && cos.size(1) == s.steps && cos.size(2) == 1 &&
                      2 * cos.size(3) == s.width;
    if (!fits) {
      refuse("rotary", "cos " + shape_text(cos) + " and sin " + shape_text(sin) + " do not fit x " + shape_text(x));
    }
    if (cos.scalar_type() != x.scalar_type() || sin.scalar_type() != x.scalar_type()) {
      refuse("rotary", "x, cos and sin must have one dtype");
    }
    if (heads_first) {
      prepare("rotary", x, s.heads_first(), out);
    } else {
      prepare("rotary", x, out);
    }
    const Floats from(x), cosines(cos), sines(sin);
    FloatResult to(out);
    const std::int64_t half = s.width / 2, tokens_of_tables = cos.size(0) * cos.size(1);
    for_rows(s.rows(), s.width, [&](std::int64_t row) {
      float* y = to.data() + (heads_first ? s.row_of(row) : row) * s.width;
      const std::int64_t angles = row / s.heads % tokens_of_tables * half;
      kernels::rotate(from.data() + row * s.width, cosines.data() + angles, sines.data() + angles, half, y);
      kernels::norm(y, s.width, static_cast<float>(eps), static_cast<float>(scale), y);
    });
    to.store();
  });
}

// sigmoid(h . weight), of as many values of h as the weight has.
float gate_of(const float* h, const float* weight, std::int64_t channels) {
  float sum = 0;
  for (std::int64_t i = 0; i < channels; ++i) sum += h[i] * weight[i];
  return 1 / (1 + std::exp(-sum));
}

void check_gate(const Heads& s, const Tensor& v, const Tensor& h, const Tensor& gate, const Tensor& table,
                const Tensor& ids) {
  constexpr const char* kName = "gate_values";
  const bool fits = h.dim() == 3 && h.size(0) == s.batch && h.size(1) == s.steps && gate.dim() == 2 &&
                    gate.size(0) == s.heads && gate.size(1) <= h.size(2);
  if (!fits || h.scalar_type() != v.scalar_type()) {
    refuse(kName, "h " + shape_text(h) + " and a gate of " + shape_text(gate) + " do not fit v " + shape_text(v));
  }
  if (table.dim() != 2 || table.size(1) != s.heads * s.width) {
    refuse(kName, "a table of " + shape_text(table) + " does not fit v " + shape_text(v));
  }
  if (ids.scalar_type() != ScalarType::Long || ids.numel() != s.batch * s.steps) {
    refuse(kName, "ids " + shape_text(ids) + " do not fit v " + shape_text(v));
  }
  const auto* id = ids.const_data_ptr<std::int64_t>();
  if (!std::all_of(id, id + ids.numel(), [&](std::int64_t i) { return 0 <= i && i < table.size(0); })) {
    refuse(kName, "an id is not within the table's " + std::to_string(table.size(0)) + " rows");
  }
}

Tensor& gate_values(KernelRuntimeContext& context, const Tensor& v, const Tensor& h, const Tensor& gate,
                    const Tensor& table, const Tensor& ids, double scale, Tensor& out) {
  return guarded(context, out, [&] {
    const Heads s("gate_values", v);
    check_gate(s, v, h, gate, table, ids);
    (void)type_of("gate_values", table);
    prepare("gate_values", v, s.heads_first(), out);
    const float* weights = float_data("gate_values", "the gate", gate);
    const Floats from(v), inputs(h);
    FloatResult to(out);
    const auto* id = ids.const_data_ptr<std::int64_t>();
    const std::int64_t channels = gate.size(1), columns = h.size(2), row_width = s.heads * s.width;
    for_rows(s.batch * s.steps, row_width, [&](std::int64_t token) {
      const Floats embedded(table, id[token] * row_width, row_width);
      for (std::int64_t head = 0; head < s.heads; ++head) {
        const float factor =
            static_cast<float>(scale) * gate_of(inputs.data() + token * columns, weights + head * channels, channels);
        const std::int64_t row = token * s.heads + head;
        kernels::mix(from.data() + row * s.width, 1, embedded.data() + head * s.width, factor, s.width,
                     to.data() + s.row_of(row) * s.width);
      }
    });
    to.store();
  });
}

Tensor& heads_first(KernelRuntimeContext& context, const Tensor& x, Tensor& out) {
  return guarded(context, out, [&] {
    const Heads s("heads_first", x);
    prepare("heads_first", x, s.heads_first(), out);
    const auto* from = static_cast<const std::byte*>(x.const_data_ptr());
    auto* to = static_cast<std::byte*>(out.mutable_data_ptr());
    const std::int64_t bytes = s.width * static_cast<std::int64_t>(x.element_size());
    for_rows(s.rows(), s.width,
             [&](std::int64_t row) { std::copy_n(from + row * bytes, bytes, to + s.row_of(row) * bytes); });
  });
}

Tensor& relu_square(KernelRuntimeContext& context, const Tensor& x, Tensor& out) {
  return guarded(context, out, [&] {
    prepare("relu_square", x, out);
    const Floats from(x);
    FloatResult to(out);
    for_values(x.numel(), [&](std::int64_t begin, std::int64_t count) {
      kernels::relu_square(from.data() + begin, count, to.data() + begin);
    });
    to.store();
  });
}

Tensor& soft_cap(KernelRuntimeContext& context, const Tensor& x, double cap, Tensor& out) {
  return guarded(context, out, [&] {
    prepare("soft_cap", x, out);
    const Floats from(x);
    FloatResult to(out);
    for_values(x.numel(), [&](std::int64_t begin, std::int64_t count) {
      kernels::soft_cap(from.data() + begin, static_cast<float>(cap), count, to.data() + begin);
    });
    to.store();
  });
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
