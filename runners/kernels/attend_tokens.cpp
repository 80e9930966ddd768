// Attention of many tokens of one head: bound by arithmetic. Keys are taken a block at a time, for all queries: a
// product for the scores, the softmax, a product with the values.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attend_tokens.cpp"
#include "targets.h"
// (must come first)
#include <hwy/foreach_target.h>
// (and then)
#include <hwy/highway.h>

#include <algorithm>
#include <type_traits>

#include "attention.h"
#include "nanochat_x/error.h"
#include "softmax-inl.h"
#include "thread_space.h"
#include "tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nanochat_x::kernels {
namespace HWY_NAMESPACE {

/// Keys of a block: whole panels of every instruction set.
constexpr std::int64_t kKeys = 2 * kPanelRows;
static_assert(kKeys % kPanel == 0);

/// Queries [begin, end) of `tokens` that see any of the keys [first, first + count).
struct Seeing {
  std::int64_t begin, end;
  Seeing(const Tokens& tokens, std::int64_t first, std::int64_t count)
      : begin(std::clamp<std::int64_t>(first - tokens.position, 0, tokens.count)),
        end(tokens.window < 0
                ? tokens.count
                : std::clamp<std::int64_t>(first + count + tokens.window - tokens.position, begin, tokens.count)) {}
};

/// Scores of a block of keys, [queries, kKeys].
template <class Stored>
void score(const Tokens& t, const Seeing& rows, const Stored* keys, std::int64_t count, float* panel, float* scores) {
  for (std::int64_t key = 0; key < count; key += kPanel) {
    fill_panel(keys + key * t.width, t.width, std::min(kPanel, count - key), t.width, panel);
    in_tiles(rows.begin, rows.end, [&](std::int64_t i, auto together) HWY_ATTR {
      tile<together, kVectors>(D(), t.q + i * t.q_stride, t.q_stride, panel, kPanel, t.width,
                               {scores + i * kKeys + key, kKeys, together, false});
    });
  }
}

/// Their softmax, by which the sums so far are brought to the new largest score.
void soften_rows(const Tokens& t, const Seeing& rows, std::int64_t first, std::int64_t count, float* scores,
                 Softmax* states) {
  const D d;
  for (std::int64_t i = rows.begin; i < rows.end; ++i) {
    const std::int64_t at = t.position + i, lowest = t.window < 0 ? 0 : at - t.window;
    const std::int64_t from = std::clamp<std::int64_t>(lowest - first, 0, count);
    const std::int64_t to = std::clamp<std::int64_t>(at + 1 - first, from, count);
    const float kept = soften<kKeys>(d, t.scale, from, to, scores + i * kKeys, states[i]);
    float* out = t.out + i * t.out_stride;
    if (kept != 1) std::transform(out, out + t.width, out, [kept](float sum) HWY_ATTR { return sum * kept; });
  }
}

/// Adds the block's values by their weights.
void add_values(const Tokens& t, const Seeing& rows, const float* values, std::int64_t count, const float* weights) {
  in_tiles(rows.begin, rows.end, [&](std::int64_t i, auto together) HWY_ATTR {
    std::int64_t at = 0;
    const auto columns = [&](auto d, auto vectors) HWY_ATTR {
      constexpr std::int64_t kStep = vectors * kLanes<decltype(d)>;
      for (; at + kStep <= t.width; at += kStep) {
        tile<together, vectors>(d, weights + i * kKeys, kKeys, values + at, t.width, count,
                                {t.out + i * t.out_stride + at, t.out_stride, together, true});
      }
    };
    columns(D(), std::integral_constant<int, kVectors>());
    columns(D(), std::integral_constant<int, 1>());
    columns(hn::CappedTag<float, 1>(), std::integral_constant<int, 1>());
  });
}

/// Values in float32: as they lie if they are, else a copy in `space`.
const float* widened(const float* values, std::int64_t, float*) { return values; }

template <class Half>
const float* widened(const Half* values, std::int64_t count, float* space) {
  std::transform(values, values + count, space, [](const Half& value) HWY_ATTR { return value_of(value); });
  return space;
}

template <class Stored>
void attend_stored(const Tokens& t, std::span<const PlacedRun> runs) {
  float* const panel = thread_space<float, Space::work>(t.width * kPanel + t.count * kKeys + kKeys * t.width);
  float* const scores = panel + t.width * kPanel;
  float* const space = scores + t.count * kKeys;
  Softmax states[kMostTokens];
  for (std::int64_t i = 0; i < t.count; ++i) std::fill_n(t.out + i * t.out_stride, t.width, 0.0F);
  for (const PlacedRun& run : runs) {
    for (std::int64_t begin = 0; begin < run.count; begin += kKeys) {
      const std::int64_t count = std::min(kKeys, run.count - begin), first = run.first + begin;
      const Seeing rows(t, first, count);
      score(t, rows, static_cast<const Stored*>(run.k) + begin * t.width, count, panel, scores);
      soften_rows(t, rows, first, count, scores, states);
      const float* values = widened(static_cast<const Stored*>(run.v) + begin * t.width, count * t.width, space);
      add_values(t, rows, values, count, scores);
    }
  }
  for (std::int64_t i = 0; i < t.count; ++i) {
    float* out = t.out + i * t.out_stride;
    std::transform(out, out + t.width, out, [sum = states[i].sum](float v) HWY_ATTR { return v / sum; });
  }
}

void attend_tokens_all(const Tokens& t, std::span<const PlacedRun> runs, Type type) {
  switch (type) {
    case Type::float32:
      return attend_stored<float>(t, runs);
    case Type::bfloat16:
      return attend_stored<hwy::bfloat16_t>(t, runs);
    case Type::float16:
      return attend_stored<hwy::float16_t>(t, runs);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace nanochat_x::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace nanochat_x::kernels {

HWY_EXPORT(attend_tokens_all);

void attend_tokens(const Tokens& tokens, std::span<const PlacedRun> runs, Type type) {
  if (tokens.count < 1 || tokens.count > kMostTokens || tokens.width < 1) {
    throw Error("attention takes 1 to " + std::to_string(kMostTokens) + " tokens and 1 column or more at once; got " +
                std::to_string(tokens.count) + " and " + std::to_string(tokens.width));
  }
  HWY_DYNAMIC_DISPATCH(attend_tokens_all)(tokens, runs, type);
}

}  // namespace nanochat_x::kernels
#endif
