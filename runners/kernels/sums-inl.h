// Sums over the lanes of vectors. Compiled once an instruction set (foreach_target.h).
#if defined(NANOCHAT_X_KERNELS_SUMS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NANOCHAT_X_KERNELS_SUMS_INL_H
#undef NANOCHAT_X_KERNELS_SUMS_INL_H
#else
#define NANOCHAT_X_KERNELS_SUMS_INL_H
#endif

#include <hwy/highway.h>

#include "formats-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nanochat_x::kernels {
namespace HWY_NAMESPACE {

/// The sums over the lanes of four vectors. The order of additions is the same for all four, so that a row of w gives
/// the same whatever it is computed beside.
template <class D>
HWY_INLINE void sums_of_lanes(D d, Vector<D> v0, Vector<D> v1, Vector<D> v2, Vector<D> v3, float* to) {
#if HWY_TARGET == HWY_SCALAR  // which has one lane, and none of the below
  to[0] = hn::GetLane(v0);
  to[1] = hn::GetLane(v1);
  to[2] = hn::GetLane(v2);
  to[3] = hn::GetLane(v3);
  (void)d;
#else
  if constexpr (kLanes<D> == 4) {
    const auto even = hn::Add(hn::InterleaveLower(d, v0, v2), hn::InterleaveUpper(d, v0, v2));
    const auto odd = hn::Add(hn::InterleaveLower(d, v1, v3), hn::InterleaveUpper(d, v1, v3));
    hn::StoreU(hn::Add(hn::InterleaveLower(d, even, odd), hn::InterleaveUpper(d, even, odd)), d, to);
  } else {
    const hn::Half<D> half;
    const auto halved = [half](Vector<D> v)
                            HWY_ATTR { return hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)); };
    sums_of_lanes(half, halved(v0), halved(v1), halved(v2), halved(v3), to);
  }
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace nanochat_x::kernels
HWY_AFTER_NAMESPACE();
#endif
