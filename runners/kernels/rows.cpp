// Functions of rows of float32.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "rows.cpp"
#include "targets.h"
// (must come first)
#include <hwy/foreach_target.h>
// (and then)
#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

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

}  // namespace nanochat_x::kernels
#endif
