#include "row_operators.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <functional>
#include <numeric>
#include <string>
#include <utility>

#include "nanochat_x/error.h"
#include "rows.h"

namespace nanochat_x::kernels {
namespace {

// A thread is worth waking for that many values: about 5 us of work on them.
constexpr std::int64_t kValuesOfAThread = 1 << 14;

// Values that functions of single ones take at a time, where they are widened and rounded: they stay in the first
// cache.
constexpr std::int64_t kBlock = 1024;

std::string text_of(const TensorView& t) {
  std::string text;
  for (const auto size : t.shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return '[' + text + ']';
}

std::int64_t bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

// Some elements at a time in float32: as they lie if they are, else in room of its own.
class Reader {
 public:
  Reader(const void* from, Type type, std::int64_t most, decltype(TensorView::read) read = nullptr)
      : from_(static_cast<const std::byte*>(from)), type_(type), read_(read) {
    if (type != Type::float32) room_.resize(static_cast<std::size_t>(most));
    if (read != nullptr) copy_.resize(static_cast<std::size_t>(most));
  }
  const float* operator()(std::int64_t first, std::int64_t count) {
    const std::byte* at = from_ + first * bytes_of(type_);
    if (read_ != nullptr && read_(at, static_cast<std::size_t>(count * bytes_of(type_)), copy_.data())) {
      at = reinterpret_cast<const std::byte*>(copy_.data());
    }
    if (type_ == Type::float32) return reinterpret_cast<const float*>(at);
    to_float32(at, type_, 0, count, room_.data());
    return room_.data();
  }

 private:
  const std::byte* from_;
  Type type_;
  decltype(TensorView::read) read_;
  std::vector<float> room_, copy_;  // copy_: of the elements in their own type
};

// Where some elements of a result are computed in float32, and rounded to its type.
class Writer {
 public:
  Writer(void* to, Type type, std::int64_t most) : to_(to), type_(type) {
    if (type != Type::float32) room_.resize(static_cast<std::size_t>(most));
  }
  // compute(y) writes elements [first, first + count).
  template <typename Compute>
  void operator()(std::int64_t first, std::int64_t count, const Compute& compute) {
    if (type_ == Type::float32) return compute(static_cast<float*>(to_) + first);
    compute(room_.data());
    from_float32(room_.data(), count, type_, to_, first);
  }

 private:
  void* to_;
  Type type_;
  std::vector<float> room_;
};

// function(x, count, y) for the values [begin, end) of x, some at a time.
template <typename Function>
void for_values(const void* x, Type type, std::int64_t begin, std::int64_t end, void* out, const Function& function) {
  Reader read(x, type, kBlock);
  Writer write(out, type, kBlock);
  for (std::int64_t at = begin; at < end; at += kBlock) {
    const std::int64_t count = std::min(kBlock, end - at);
    write(at, count, [&](float* y) { function(read(at, count), count, y); });
  }
}

// sigmoid(h . weight), of as many values of h as the weight has.
float gate_of(const float* h, const float* weight, std::int64_t channels) {
  float sum = 0;
  for (std::int64_t i = 0; i < channels; ++i) sum += h[i] * weight[i];
  return 1 / (1 + std::exp(-sum));
}

}  // namespace

std::int64_t TensorView::count() const {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

RowOperator::RowOperator(const char* name, const TensorView& x) : name_(name), shape_(x.shape), type_() {
  if (!x.type) refuse("x is neither float32 nor bfloat16 nor float16");
  type_ = *x.type;
  set_parts(x.count(), 1);
}

void RowOperator::refuse(const std::string& reason) const {
  throw Error("nanochat_x::" + std::string(name_) + ": " + reason);
}

void RowOperator::set_parts(std::int64_t parts, std::int64_t values_of_a_part) {
  parts_ = parts;
  values_ = std::max<std::int64_t>(1, values_of_a_part);
}

std::int64_t RowOperator::parts_of_a_thread() const { return std::max<std::int64_t>(1, kValuesOfAThread / values_); }

const float* RowOperator::floats(const char* what, const TensorView& t) const {
  if (t.type != Type::float32) refuse(std::string(what) + " must be float32");
  return static_cast<const float*>(t.data);
}

Norm::Norm(const TensorView& x, double eps) : RowOperator("norm", x), x_(x.data), eps_(static_cast<float>(eps)) {
  if (x.shape.empty()) refuse("x has no dimension");
  width_ = x.shape.back();
  set_parts(x.count() == 0 ? 0 : x.count() / width_, width_);
}

void Norm::compute(std::int64_t begin, std::int64_t end, void* out) const {
  Reader read(x_, type(), width_);
  Writer write(out, type(), width_);
  for (std::int64_t row = begin; row < end; ++row) {
    write(row * width_, width_, [&](float* y) { norm(read(row * width_, width_), width_, eps_, 1, y); });
  }
}

Mix::Mix(const TensorView& x, const TensorView& x_scales, const TensorView& y, const TensorView& y_scales,
         std::int64_t index)
    : RowOperator("mix", x), x_(x.data), y_(y.data) {
  if (x.shape != y.shape || x.type != y.type) refuse("x " + text_of(x) + " and y " + text_of(y) + " are not alike");
  if (index < 0 || index >= x_scales.count() || index >= y_scales.count()) {
    refuse("there is no scale " + std::to_string(index));
  }
  a_ = floats("scales", x_scales)[index];
  b_ = floats("scales", y_scales)[index];
}

void Mix::compute(std::int64_t begin, std::int64_t end, void* out) const {
  Reader others(y_, type(), kBlock);
  std::int64_t at = begin;
  for_values(x_, type(), begin, end, out, [&](const float* x, std::int64_t count, float* sum) {
    mix(x, a_, others(at, count), b_, count, sum);
    at += count;
  });
}

ReluSquare::ReluSquare(const TensorView& x) : RowOperator("relu_square", x), x_(x.data) {}

void ReluSquare::compute(std::int64_t begin, std::int64_t end, void* out) const {
  for_values(x_, type(), begin, end, out,
             [](const float* x, std::int64_t count, float* y) { relu_square(x, count, y); });
}

SoftCap::SoftCap(const TensorView& x, double cap)
    : RowOperator("soft_cap", x), x_(x.data), cap_(static_cast<float>(cap)) {}

void SoftCap::compute(std::int64_t begin, std::int64_t end, void* out) const {
  for_values(x_, type(), begin, end, out,
             [this](const float* x, std::int64_t count, float* y) { soft_cap(x, cap_, count, y); });
}

HeadsOperator::HeadsOperator(const char* name, const TensorView& x) : RowOperator(name, x) {
  if (x.shape.size() != 4 || x.count() == 0) refuse("x is " + text_of(x) + ", not [B, T, H, D]");
  batch_ = x.shape[0];
  steps_ = x.shape[1];
  heads_ = x.shape[2];
  width_ = x.shape[3];
  set_parts(batch_ * steps_ * heads_, width_);
}

std::int64_t HeadsOperator::row_of(std::int64_t row) const {
  const std::int64_t h = row % heads_, t = row / heads_ % steps_, b = row / heads_ / steps_;
  return (b * heads_ + h) * steps_ + t;
}

Rotary::Rotary(const TensorView& x, const TensorView& cos, const TensorView& sin, double eps, double scale,
               bool heads_first)
    : HeadsOperator("rotary", x),
      x_(x.data),
      cos_(cos.data),
      sin_(sin.data),
      eps_(static_cast<float>(eps)),
      scale_(static_cast<float>(scale)),
      heads_first_(heads_first) {
  const auto& s = cos.shape;
  const bool fits = s.size() == 4 && s == sin.shape && (s[0] == 1 || s[0] == batch_) && s[1] == steps_ && s[2] == 1 &&
                    2 * s[3] == width_;
  if (!fits) refuse("cos " + text_of(cos) + " and sin " + text_of(sin) + " do not fit x " + text_of(x));
  if (cos.type != x.type || sin.type != x.type) refuse("x, cos and sin must have one dtype");
  tokens_of_tables_ = s[0] * s[1];
  if (heads_first) set_shape(this->heads_first());
}

void Rotary::compute(std::int64_t begin, std::int64_t end, void* out) const {
  const std::int64_t half = width_ / 2;
  Reader read(x_, type(), width_), cosines(cos_, type(), half), sines(sin_, type(), half);
  Writer write(out, type(), width_);
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t angles = row / heads_ % tokens_of_tables_ * half;
    write((heads_first_ ? row_of(row) : row) * width_, width_, [&](float* y) {
      rotate(read(row * width_, width_), cosines(angles, half), sines(angles, half), half, y);
      norm(y, width_, eps_, scale_, y);
    });
  }
}

GateValues::GateValues(const TensorView& v, const TensorView& h, const TensorView& gate, const TensorView& table,
                       const TensorView& ids, double scale)
    : HeadsOperator("gate_values", v),
      v_(v.data),
      h_(h.data),
      table_(table.data),
      read_table_(table.read),
      table_type_(),
      scale_(static_cast<float>(scale)) {
  const bool fits = h.shape.size() == 3 && h.shape[0] == batch_ && h.shape[1] == steps_ && gate.shape.size() == 2 &&
                    gate.shape[0] == heads_ && gate.shape[1] <= h.shape[2];
  if (!fits || h.type != v.type) {
    refuse("h " + text_of(h) + " and a gate of " + text_of(gate) + " do not fit v " + text_of(v));
  }
  if (table.shape.size() != 2 || table.shape[1] != heads_ * width_ || !table.type) {
    refuse("a table of " + text_of(table) + " does not fit v " + text_of(v));
  }
  if (!ids.int64 || ids.count() != batch_ * steps_) refuse("ids " + text_of(ids) + " do not fit v " + text_of(v));
  gate_ = floats("the gate", gate);
  ids_ = static_cast<const std::int64_t*>(ids.data);
  if (!std::all_of(ids_, ids_ + ids.count(), [&](std::int64_t i) { return 0 <= i && i < table.shape[0]; })) {
    refuse("an id is not within the table's " + std::to_string(table.shape[0]) + " rows");
  }
  table_type_ = *table.type;
  columns_ = h.shape[2];
  channels_ = gate.shape[1];
  set_shape(heads_first());
  set_parts(batch_ * steps_, heads_ * width_);
}

void GateValues::compute(std::int64_t begin, std::int64_t end, void* out) const {
  const std::int64_t row_width = heads_ * width_;
  Reader values(v_, type(), row_width), inputs(h_, type(), channels_),
      rows(table_, table_type_, row_width, read_table_);
  Writer write(out, type(), width_);
  for (std::int64_t token = begin; token < end; ++token) {
    const float* const v = values(token * row_width, row_width);
    const float* const h = inputs(token * columns_, channels_);
    const float* const embedded = rows(ids_[token] * row_width, row_width);
    for (std::int64_t head = 0; head < heads_; ++head) {
      const float factor = scale_ * gate_of(h, gate_ + head * channels_, channels_);
      write(row_of(token * heads_ + head) * width_, width_,
            [&](float* y) { mix(v + head * width_, 1, embedded + head * width_, factor, width_, y); });
    }
  }
}

HeadsFirst::HeadsFirst(const TensorView& x) : HeadsOperator("heads_first", x), x_(x.data) { set_shape(heads_first()); }

void HeadsFirst::compute(std::int64_t begin, std::int64_t end, void* out) const {
  const std::int64_t bytes = width_ * bytes_of(type());
  for (std::int64_t row = begin; row < end; ++row) {
    std::copy_n(static_cast<const std::byte*>(x_) + row * bytes, bytes,
                static_cast<std::byte*>(out) + row_of(row) * bytes);
  }
}

}  // namespace nanochat_x::kernels
