#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace nanochat_x::kernels {

/// A row-major tensor of whatever library, which owns it.
struct TensorView {
  std::vector<std::int64_t> shape;
  std::optional<Type> type;  // none: something else than `Type` names
  bool int64 = false;        // if it is none
  const void* data = nullptr;
  /// Copies `size` bytes of it to `to`: for tensors of which little is read, rather than as they lie. False: it cannot.
  bool (*read)(const void* from, std::size_t size, void* to) = nullptr;

  std::int64_t count() const;
};

/// A call of an operator of nanochat_x/row_operators.py: what stands between a model's products, as functions of rows.
/// Computed in float32, each result rounded once. Constructors check what they are given, and throw Error
/// `nanochat_x::NAME: REASON`.
///
/// A caller makes room for the result and splits the parts [0, `parts`) between its threads, of which each is worth
/// waking for `parts_of_a_thread`; they may call `compute` at once, and write what no other does.
class RowOperator {
 public:
  virtual ~RowOperator() = default;
  RowOperator(const RowOperator&) = delete;
  RowOperator& operator=(const RowOperator&) = delete;

  const char* name() const { return name_; }
  /// Of the result.
  const std::vector<std::int64_t>& shape() const { return shape_; }
  Type type() const { return type_; }

  std::int64_t parts() const { return parts_; }
  std::int64_t parts_of_a_thread() const;
  /// Computes parts [begin, end) of the result, which lies at `out`.
  virtual void compute(std::int64_t begin, std::int64_t end, void* out) const = 0;

 protected:
  /// A result of x's type. x must have one that the kernels take.
  RowOperator(const char* name, const TensorView& x);
  [[noreturn]] void refuse(const std::string& reason) const;
  void set_parts(std::int64_t parts, std::int64_t values_of_a_part);
  void set_shape(std::vector<std::int64_t> shape) { shape_ = std::move(shape); }
  const float* floats(const char* what, const TensorView& t) const;

 private:
  const char* name_;
  std::vector<std::int64_t> shape_;
  Type type_;
  std::int64_t parts_ = 0, values_ = 1;
};

/// x / sqrt(mean(x^2) + eps) over the last dimension.
class Norm : public RowOperator {
 public:
  Norm(const TensorView& x, double eps);
  void compute(std::int64_t begin, std::int64_t end, void* out) const override;

 private:
  const void* x_;
  std::int64_t width_;
  float eps_;
};

/// x_scales[index] x + y_scales[index] y. Scales: float32.
class Mix : public RowOperator {
 public:
  Mix(const TensorView& x, const TensorView& x_scales, const TensorView& y, const TensorView& y_scales,
      std::int64_t index);
  void compute(std::int64_t begin, std::int64_t end, void* out) const override;

 private:
  const void *x_, *y_;
  float a_ = 0, b_ = 0;
};

/// max(x, 0)^2.
class ReluSquare : public RowOperator {
 public:
  explicit ReluSquare(const TensorView& x);
  void compute(std::int64_t begin, std::int64_t end, void* out) const override;

 private:
  const void* x_;
};

/// cap tanh(x / cap).
class SoftCap : public RowOperator {
 public:
  SoftCap(const TensorView& x, double cap);
  void compute(std::int64_t begin, std::int64_t end, void* out) const override;

 private:
  const void* x_;
  float cap_;
};

/// Of a row for each head of each token: x [B, T, H, D].
class HeadsOperator : public RowOperator {
 protected:
  HeadsOperator(const char* name, const TensorView& x);
  std::vector<std::int64_t> heads_first() const { return {batch_, heads_, steps_, width_}; }
  /// Where row [b, t, h] is with heads first, [b, h, t].
  std::int64_t row_of(std::int64_t row) const;

  std::int64_t batch_, steps_, heads_, width_;
};

/// Rotary position embedding, norm of each head and a factor; [B, T, H, D], or [B, H, T, D] with `heads_first`.
/// cos, sin [1 or B, T, 1, D / 2].
class Rotary : public HeadsOperator {
 public:
  Rotary(const TensorView& x, const TensorView& cos, const TensorView& sin, double eps, double scale, bool heads_first);
  void compute(std::int64_t begin, std::int64_t end, void* out) const override;

 private:
  const void *x_, *cos_, *sin_;
  std::int64_t tokens_of_tables_;
  float eps_, scale_;
  bool heads_first_;
};

/// v + scale sigmoid(h[..., :channels] . gate) table[ids], heads first: v [B, T, H, D], h [B, T, C], gate float32
/// [H, channels], table [rows, H * D], ids int64 [B, T].
class GateValues : public HeadsOperator {
 public:
  GateValues(const TensorView& v, const TensorView& h, const TensorView& gate, const TensorView& table,
             const TensorView& ids, double scale);
  void compute(std::int64_t begin, std::int64_t end, void* out) const override;

 private:
  const void *v_, *h_, *table_;
  bool (*read_table_)(const void*, std::size_t, void*);
  const float* gate_;
  const std::int64_t* ids_;
  Type table_type_;
  std::int64_t columns_, channels_;
  float scale_;
};

/// [B, T, H, D] as [B, H, T, D].
class HeadsFirst : public HeadsOperator {
 public:
  explicit HeadsFirst(const TensorView& x);
  void compute(std::int64_t begin, std::int64_t end, void* out) const override;

 private:
  const void* x_;
};

}  // namespace nanochat_x::kernels
