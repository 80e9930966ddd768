// Attention of one token, over keys and values where they lie.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attend.cpp"
#include "targets.h"
// (must come first)
#include <hwy/foreach_target.h>
// (and then)
#include <hwy/highway.h>

#include <algorithm>

#include "checks.h"
#include "kernels.h"
#include "linear-inl.h"
#include "softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nanochat_x::kernels {
namespace HWY_NAMESPACE {

/// Keys that are taken together: their scores, then their values. A multiple of every vector; two of float32 [64, 128]
/// stay in the caches next to the core.
constexpr std::int64_t kBlock = 64;
/// Heads that are taken together.
constexpr std::int64_t kHeads = 4;

/// out[h] = out[h] * kept[h] + sum over keys of weights[h][key] * v[key], for V vectors from column `at` on.
template <int H, int V, class D, class Stored>
HWY_INLINE void add_columns(D d, const float (*weights)[kBlock], const float* kept, const Stored* v, std::int64_t count,
                            std::int64_t width, float* out, std::int64_t out_stride) {
  Vector<D> sums[H][V];
  for (int h = 0; h < H; ++h) {
    const auto factor = hn::Set(d, kept[h]);
    for (int i = 0; i < V; ++i) sums[h][i] = hn::Mul(hn::LoadU(d, out + h * out_stride + i * kLanes<D>), factor);
  }
  for (std::int64_t key = 0; key < count; ++key) {
    Vector<D> values[V];
    for (int i = 0; i < V; ++i) values[i] = load(d, v + key * width + i * kLanes<D>);
    for (int h = 0; h < H; ++h) {
      const auto weight = hn::Set(d, weights[h][key]);
      for (int i = 0; i < V; ++i) sums[h][i] = hn::MulAdd(weight, values[i], sums[h][i]);
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int i = 0; i < V; ++i) hn::StoreU(sums[h][i], d, out + h * out_stride + i * kLanes<D>);
  }
}

/// The same for all columns. Those that are less than a vector are computed one by one.
template <int H, class D, class Stored>
HWY_NOINLINE void add_values(D d, const float (*weights)[kBlock], const float* kept, const Stored* v,
                             std::int64_t count, std::int64_t width, float* out, std::int64_t out_stride) {
  constexpr int kMany = H == 1 ? 8 : 4;
  std::int64_t at = 0;
  for (; at + kMany * kLanes<D> <= width; at += kMany * kLanes<D>) {
    add_columns<H, kMany>(d, weights, kept, v + at, count, width, out + at, out_stride);
  }
  for (; at + kLanes<D> <= width; at += kLanes<D>) {
    add_columns<H, 1>(d, weights, kept, v + at, count, width, out + at, out_stride);
  }
  const hn::CappedTag<float, 1> one;
  for (; at < width; ++at) add_columns<H, 1>(one, weights, kept, v + at, count, width, out + at, out_stride);
}

/// A few heads over all runs.
template <class Stored, class D>
void attend_heads(D d, const float* q, std::int64_t q_stride, std::int64_t heads, std::int64_t width, float scale,
                  std::span<const Run> runs, float* out, std::int64_t out_stride) {
  Softmax states[kHeads];
  float scores[kHeads][kBlock], kept[kHeads];
  for (std::int64_t h = 0; h < heads; ++h) std::fill_n(out + h * out_stride, width, 0.0F);
  for (const Run& run : runs) {
    const auto* values = static_cast<const Stored*>(run.v);
    for (std::int64_t begin = 0; begin < run.count; begin += kBlock) {
      const std::int64_t count = std::min(kBlock, run.count - begin);
      const Plain<D, Stored> keys{static_cast<const Stored*>(run.k) + begin * width, width, width};
      product(d, keys, {q, q_stride, heads, width, scores[0], kBlock}, 0, count);
      for (std::int64_t h = 0; h < heads; ++h) {
        kept[h] = soften<kBlock>(d, scale, 0, count, scores[h], states[h]);
      }
      const Stored* v = values + begin * width;
      for (std::int64_t h = 0; h < heads;) {
        float* to = out + h * out_stride;
        if (heads - h >= 2) {
          add_values<2>(d, scores + h, kept + h, v, count, width, to, out_stride);
          h += 2;
        } else {
          add_values<1>(d, scores + h, kept + h, v, count, width, to, out_stride);
          h += 1;
        }
      }
    }
  }
  for (std::int64_t h = 0; h < heads; ++h) {
    for (std::int64_t i = 0; i < width; ++i) out[h * out_stride + i] /= states[h].sum;
  }
}

void attend_all(const float* q, std::int64_t q_stride, std::int64_t heads, std::int64_t width, float scale,
                std::span<const Run> runs, Type type, float* out, std::int64_t out_stride) {
  const hn::ScalableTag<float> d;
  for (std::int64_t h = 0; h < heads; h += kHeads) {
    const std::int64_t together = std::min(kHeads, heads - h);
    const auto attend = [&](auto stored) HWY_ATTR {
      attend_heads<decltype(stored)>(d, q + h * q_stride, q_stride, together, width, scale, runs, out + h * out_stride,
                                     out_stride);
    };
    switch (type) {
      case Type::float32:
        attend(float());
        break;
      case Type::bfloat16:
        attend(hwy::bfloat16_t());
        break;
      case Type::float16:
        attend(hwy::float16_t());
        break;
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace nanochat_x::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace nanochat_x::kernels {

HWY_EXPORT(attend_all);

void attend(const float* q, std::int64_t q_stride, std::int64_t heads, std::int64_t width, float scale,
            std::span<const Run> runs, Type type, float* out, std::int64_t out_stride) {
  if (heads < 1 || width < 1) {
    throw Error("attention takes 1 head and 1 column or more; got " + std::to_string(heads) + " and " +
                std::to_string(width));
  }
  if (std::ranges::none_of(runs, [](const Run& run) { return run.count > 0; })) {
    throw Error("attention over no key at all has no result");
  }
  HWY_DYNAMIC_DISPATCH(attend_all)(q, q_stride, heads, width, scale, runs, type, out, out_stride);
}

}  // namespace nanochat_x::kernels
#endif
