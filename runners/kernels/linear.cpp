// Weights of float32, bfloat16 and float16.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "linear.cpp"
#include "targets.h"
// (must come first)
#include <hwy/foreach_target.h>
// (and then)
#include <hwy/highway.h>

#include "checks.h"
#include "kernels.h"
#include "linear-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nanochat_x::kernels {
namespace HWY_NAMESPACE {

void linear_plain(const Activations& to, const void* w, Type type, std::int64_t begin, std::int64_t end) {
  with_plain(to.K, w, type, [&](const auto& f) HWY_ATTR { product(hn::ScalableTag<float>(), f, to, begin, end); });
}

std::string name() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace nanochat_x::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace nanochat_x::kernels {

HWY_EXPORT(linear_plain);
HWY_EXPORT(name);

void linear(const float* x, std::int64_t M, std::int64_t K, const void* w, Type type, float* y, std::int64_t y_stride,
            std::int64_t begin, std::int64_t end) {
  check_batch(M);
  check_width(K);
  check_rows(begin, end);
  HWY_DYNAMIC_DISPATCH(linear_plain)({x, K, M, K, y, y_stride}, w, type, begin, end);
}

std::string instruction_set() { return HWY_DYNAMIC_DISPATCH(name)(); }

}  // namespace nanochat_x::kernels
#endif
