// Weights of int8.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "linear_int8.cpp"
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

void product_int8(const Activations& to, const std::int8_t* q, const std::uint16_t* scales, std::int64_t group,
                  std::int64_t begin, std::int64_t end) {
  with_vectors_for(group, [&](auto d, auto longest) HWY_ATTR {
    const Int8<decltype(d)> f{{to.K, group}, q, scales};
    if constexpr (longest) {
      product(d, f, to, begin, end);
    } else {
      product_by_rows(d, f, to, begin, end);
    }
  });
}

template <typename Out>
void widened_int8(std::int64_t K, const std::int8_t* q, const std::uint16_t* scales, std::int64_t group, Out* out,
                  std::int64_t begin, std::int64_t end) {
  with_vectors_for(
      group, [&](auto d, auto) HWY_ATTR { widened(d, Int8<decltype(d)>{{K, group}, q, scales}, K, out, begin, end); });
}

void floats_of_int8(std::int64_t K, const std::int8_t* q, const std::uint16_t* scales, std::int64_t group, float* out,
                    std::int64_t begin, std::int64_t end) {
  widened_int8(K, q, scales, group, out, begin, end);
}

void bfloats_of_int8(std::int64_t K, const std::int8_t* q, const std::uint16_t* scales, std::int64_t group,
                     std::uint16_t* out, std::int64_t begin, std::int64_t end) {
  widened_int8(K, q, scales, group, out, begin, end);
}

}  // namespace HWY_NAMESPACE
}  // namespace nanochat_x::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace nanochat_x::kernels {

HWY_EXPORT(product_int8);
HWY_EXPORT(floats_of_int8);
HWY_EXPORT(bfloats_of_int8);

void linear_int8(const float* x, std::int64_t M, std::int64_t K, const std::int8_t* q, const std::uint16_t* scales,
                 std::int64_t group, float* y, std::int64_t y_stride, std::int64_t begin, std::int64_t end) {
  check_batch(M);
  check_width(K);
  check_group(K, group);
  check_rows(begin, end);
  HWY_DYNAMIC_DISPATCH(product_int8)({x, K, M, K, y, y_stride}, q, scales, group, begin, end);
}

void widen_int8(std::int64_t K, const std::int8_t* q, const std::uint16_t* scales, std::int64_t group, float* out,
                std::int64_t begin, std::int64_t end) {
  check_width(K);
  check_group(K, group);
  check_rows(begin, end);
  HWY_DYNAMIC_DISPATCH(floats_of_int8)(K, q, scales, group, out, begin, end);
}

void widen_int8(std::int64_t K, const std::int8_t* q, const std::uint16_t* scales, std::int64_t group,
                std::uint16_t* out, std::int64_t begin, std::int64_t end) {
  check_width(K);
  check_group(K, group);
  check_rows(begin, end);
  HWY_DYNAMIC_DISPATCH(bfloats_of_int8)(K, q, scales, group, out, begin, end);
}

}  // namespace nanochat_x::kernels
#endif
