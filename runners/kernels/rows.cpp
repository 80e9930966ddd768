// Functions of rows of float32.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "rows.cpp"
#include "targets.h"
// (must come first)
#include <hwy/foreach_target.h>
// (and then)
#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>

#include "formats-inl.h"
#include "rows.h"

HWY_BEFORE_NAMESPACE();
namespace nanochat_x::kernels {
namespace HWY_NAMESPACE {

/// Calls use(d, i) for the vectors of [0, count), then for what is left, one by one.
template <class Use>
HWY_INLINE void for_each(std::int64_t count, Use use) {
  const hn::ScalableTag<float> d;
  const hn::CappedTag<float, 1> one;
  std::int64_t i = 0;
  for (; i + kLanes<decltype(d)> <= count; i += kLanes<decltype(d)>) use(d, i);
  for (; i < count; ++i) use(one, i);
}

void norm_row(const float* x, std::int64_t width, float eps, float scale, float* out) {
  const hn::ScalableTag<float> d;
  auto sums = hn::Zero(d);
  std::int64_t i = 0;
  for (; i + kLanes<decltype(d)> <= width; i += kLanes<decltype(d)>) {
    const auto v = hn::LoadU(d, x + i);
    sums = hn::MulAdd(v, v, sums);
  }
  float sum = hn::GetLane(hn::SumOfLanes(d, sums));
  for (; i < width; ++i) sum += x[i] * x[i];
  const float factor = scale / std::sqrt(sum / static_cast<float>(width) + eps);
  for_each(width, [=](auto lanes, std::int64_t at) HWY_ATTR {
    hn::StoreU(hn::Mul(hn::LoadU(lanes, x + at), hn::Set(lanes, factor)), lanes, out + at);
  });
}

void mix_rows(const float* x, float a, const float* y, float b, std::int64_t count, float* out) {
  for_each(count, [=](auto d, std::int64_t at) HWY_ATTR {
    const auto scaled = hn::Mul(hn::LoadU(d, y + at), hn::Set(d, b));
    hn::StoreU(hn::MulAdd(hn::LoadU(d, x + at), hn::Set(d, a), scaled), d, out + at);
  });
}

void rotate_row(const float* x, const float* cos, const float* sin, std::int64_t half, float* out) {
  for_each(half, [=](auto d, std::int64_t at) HWY_ATTR {
    const auto a = hn::LoadU(d, x + at), b = hn::LoadU(d, x + half + at), c = hn::LoadU(d, cos + at),
               s = hn::LoadU(d, sin + at);
    hn::StoreU(hn::MulAdd(a, c, hn::Mul(b, s)), d, out + at);
    hn::StoreU(hn::NegMulAdd(a, s, hn::Mul(b, c)), d, out + half + at);
  });
}

void relu_square_rows(const float* x, std::int64_t count, float* out) {
  for_each(count, [=](auto d, std::int64_t at) HWY_ATTR {
    const auto v = hn::LoadU(d, x + at);
    hn::StoreU(hn::IfThenElse(hn::Lt(v, hn::Zero(d)), hn::Zero(d), hn::Mul(v, v)), d, out + at);
  });
}

void soft_cap_rows(const float* x, float cap, std::int64_t count, float* out) {
  for_each(count, [=](auto d, std::int64_t at) HWY_ATTR {
    const auto v = hn::LoadU(d, x + at), limit = hn::Set(d, cap);
    const auto capped = hn::Mul(limit, hn::Tanh(d, hn::Div(v, limit)));
    hn::StoreU(hn::IfThenElse(hn::IsNaN(v), v, capped), d, out + at);  // Tanh has a number for NaN
  });
}

/// Of float16 values: rounded by integers, as Highway's own conversion is on few processors.
template <class D>
HWY_INLINE Vector<hn::Rebind<std::uint16_t, D>> float16_of(D d, Vector<D> v) {
  const hn::RebindToUnsigned<D> words;
  const hn::Rebind<std::uint16_t, D> halves;
  const auto bits = hn::BitCast(words, v);
  const auto magnitude = hn::And(bits, hn::Set(words, 0x7FFFFFFF));
  // From 2^-14 on: 13 bits of the significand go, the exponent's bias falls from 127 to 15.
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(words, 1));
  const auto normal = hn::ShiftRight<13>(hn::Add(hn::Add(magnitude, odd), hn::Set(words, 0xC8000FFFu)));
  // Below it: added to 0.5, whose last bit is float16's smallest number, values are rounded by the addition.
  const auto half = hn::Set(d, 0.5F);
  const auto small = hn::Sub(hn::BitCast(words, hn::Add(hn::BitCast(d, magnitude), half)), hn::BitCast(words, half));
  // From 65,520 on: infinity, or a NaN
  const auto nan = hn::Gt(magnitude, hn::Set(words, 0x7F800000));
  const auto large = hn::IfThenElse(nan, hn::Set(words, 0x7E00), hn::Set(words, 0x7C00));
  auto out = hn::IfThenElse(hn::Lt(magnitude, hn::Set(words, 0x38800000)), small, normal);
  out = hn::IfThenElse(hn::Lt(magnitude, hn::Set(words, 0x477FF000)), out, large);
  const auto sign = hn::ShiftRight<16>(hn::AndNot(hn::Set(words, 0x7FFFFFFF), bits));
  return hn::TruncateTo(halves, hn::Or(out, sign));
}

template <class D>
HWY_INLINE Vector<hn::Rebind<std::uint16_t, D>> bfloat16_of(D d, Vector<D> v) {
  const hn::RebindToUnsigned<D> words;
  const auto nan = hn::Or(hn::BitCast(words, v), hn::Set(words, 0x400000));
  return upper_half(hn::IfThenElse(hn::RebindMask(words, hn::IsNaN(v)), nan, rounded_to_bfloat16(d, v)));
}

void to_float32_values(const void* from, Type type, std::int64_t first, std::int64_t count, float* out) {
  with_plain(1, from, type, [=](const auto& stored) HWY_ATTR {
    const auto* const at = stored.w + first;
    for_each(count, [=](auto d, std::int64_t i) HWY_ATTR { hn::StoreU(load(d, at + i), d, out + i); });
  });
}

void from_float32_values(const float* x, std::int64_t count, Type type, void* to, std::int64_t first) {
  if (type == Type::float32) {
    std::copy_n(x, count, static_cast<float*>(to) + first);
    return;
  }
  auto* const out = static_cast<std::uint16_t*>(to) + first;
  for_each(count, [=](auto d, std::int64_t i) HWY_ATTR {
    const auto v = hn::LoadU(d, x + i);
    const hn::Rebind<std::uint16_t, decltype(d)> halves;
    hn::StoreU(type == Type::bfloat16 ? bfloat16_of(d, v) : float16_of(d, v), halves, out + i);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace nanochat_x::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace nanochat_x::kernels {

HWY_EXPORT(norm_row);
HWY_EXPORT(mix_rows);
HWY_EXPORT(rotate_row);
HWY_EXPORT(relu_square_rows);
HWY_EXPORT(soft_cap_rows);
HWY_EXPORT(to_float32_values);
HWY_EXPORT(from_float32_values);

void norm(const float* x, std::int64_t width, float eps, float scale, float* out) {
  HWY_DYNAMIC_DISPATCH(norm_row)(x, width, eps, scale, out);
}

void mix(const float* x, float a, const float* y, float b, std::int64_t count, float* out) {
  HWY_DYNAMIC_DISPATCH(mix_rows)(x, a, y, b, count, out);
}

void rotate(const float* x, const float* cos, const float* sin, std::int64_t half, float* out) {
  HWY_DYNAMIC_DISPATCH(rotate_row)(x, cos, sin, half, out);
}

void relu_square(const float* x, std::int64_t count, float* out) {
  HWY_DYNAMIC_DISPATCH(relu_square_rows)(x, count, out);
}

void soft_cap(const float* x, float cap, std::int64_t count, float* out) {
  HWY_DYNAMIC_DISPATCH(soft_cap_rows)(x, cap, count, out);
}

void to_float32(const void* from, Type type, std::int64_t first, std::int64_t count, float* out) {
  HWY_DYNAMIC_DISPATCH(to_float32_values)(from, type, first, count, out);
}

void from_float32(const float* x, std::int64_t count, Type type, void* to, std::int64_t first) {
  HWY_DYNAMIC_DISPATCH(from_float32_values)(x, count, type, to, first);
}

}  // namespace nanochat_x::kernels
#endif
