// A softmax that is computed on the way, block by block. Compiled once an instruction set (foreach_target.h).
#if defined(NANOCHAT_X_KERNELS_SOFTMAX_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NANOCHAT_X_KERNELS_SOFTMAX_INL_H
#undef NANOCHAT_X_KERNELS_SOFTMAX_INL_H
#else
#define NANOCHAT_X_KERNELS_SOFTMAX_INL_H
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <limits>

#include "formats-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nanochat_x::kernels {
namespace HWY_NAMESPACE {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

/// One query on its way: the largest score so far, and the sum of exp(score - largest). The sum of values with the same
/// factors is the caller's.
struct Softmax {
  float largest = kLowest, sum = 0;
};

/// Turns scores [from, to) of a block into exp(scale * score - largest), and the rest of it into 0; returns what the
/// sums before are to be multiplied by. kBlock: a multiple of every vector.
template <std::int64_t kBlock, class D>
float soften(D d, float scale, std::int64_t from, std::int64_t to, float* scores, Softmax& state) {
  std::fill(scores, scores + from, kLowest);
  std::transform(scores + from, scores + to, scores + from, [scale](float score) HWY_ATTR { return score * scale; });
  std::fill(scores + to, scores + kBlock, kLowest);
  auto largest = hn::Set(d, state.largest);
  for (std::int64_t i = 0; i < kBlock; i += kLanes<D>) largest = hn::Max(largest, hn::LoadU(d, scores + i));
  const float before = state.largest;
  state.largest = hn::GetLane(hn::MaxOfLanes(d, largest));
  // Where all scores so far are minus infinity there is nothing to subtract: their factors are 0.
  const auto base = hn::Set(d, state.largest == kLowest ? 0 : state.largest);
  auto sum = hn::Zero(d);
  const auto exp = [d](auto x)
                       HWY_ATTR { return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(d, x)); };  // Exp has 0 for NaN
  for (std::int64_t i = 0; i < kBlock; i += kLanes<D>) {
    const auto weight = exp(hn::Sub(hn::LoadU(d, scores + i), base));
    hn::StoreU(weight, d, scores + i);
    sum = hn::Add(sum, weight);
  }
  const float kept = before == state.largest ? 1.0F : hn::GetLane(exp(hn::Sub(hn::Set(d, before), base)));
  state.sum = state.sum * kept + hn::GetLane(hn::SumOfLanes(d, sum));
  return kept;
}

}  // namespace HWY_NAMESPACE
}  // namespace nanochat_x::kernels
HWY_AFTER_NAMESPACE();
#endif
