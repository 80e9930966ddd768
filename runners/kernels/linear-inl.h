// The product of a few rows of x with many of w, in any format. Compiled once an instruction set (foreach_target.h).
#if defined(NANOCHAT_X_KERNELS_LINEAR_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NANOCHAT_X_KERNELS_LINEAR_INL_H
#undef NANOCHAT_X_KERNELS_LINEAR_INL_H
#else
#define NANOCHAT_X_KERNELS_LINEAR_INL_H
#endif

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "activations.h"
#include "blocks.h"
#include "formats-inl.h"
#include "packed.h"
#include "sums-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nanochat_x::kernels {
namespace HWY_NAMESPACE {

/// y[m, row + r] for R rows of w and M of x at once: each vector of w is used for all rows of x, and each of x for all
/// rows of w.
template <int R, int M, class D, class Format>
HWY_INLINE void tile(D d, const Format& f, const float* x, const Output& to, std::int64_t row, Ahead& ahead) {
  // One row of x alone would leave too few sums in flight: those of both vectors of a step are kept apart. It also
  // makes it worth while to scale sums rather than weights.
  constexpr bool kAlone = M == 1;
  constexpr bool kLate = kAlone && Format::kScaled;
  constexpr int kSums = kAlone ? 2 : 1;
  constexpr std::int64_t N = kLanes<D>;

  Vector<D> sums[R][M][kSums], total[R];
  for (int r = 0; r < R; ++r) {
    total[r] = hn::Zero(d);
    for (int m = 0; m < M; ++m) {
      for (int i = 0; i < kSums; ++i) sums[r][m][i] = hn::Zero(d);
    }
  }
  const auto add = [&](const Vector<D>(&w)[R][2], const float* a, const float* b) HWY_ATTR {
    for (int m = 0; m < M; ++m) {
      const auto xa = hn::LoadU(d, a + m * N);
      for (int r = 0; r < R; ++r) sums[r][m][0] = hn::MulAdd(w[r][0], xa, sums[r][m][0]);
    }
    for (int m = 0; m < M; ++m) {
      const auto xb = hn::LoadU(d, b + m * N);
      for (int r = 0; r < R; ++r) sums[r][m][kSums - 1] = hn::MulAdd(w[r][1], xb, sums[r][m][kSums - 1]);
    }
  };

  // Plain weights are asked for a block ahead. A tile of others is small: the next one, beside it.
  Ahead next(f.bytes(row + R), f.bytes(row + 2 * R), R * Format::kStepBytes);
  Vector<D> w[R][2];
  for (std::int64_t g = 0; g < f.groups(); ++g) {
    typename Format::Group group[R];
    for (int r = 0; r < R; ++r) group[r] = f.template group<kLate>(row + r, g);
    for (std::int64_t step = 0; step < f.steps(); ++step) {
      if constexpr (Format::kScaled) {
        next.template fetch<1>();
      } else if constexpr (R > 1) {
        ahead.template fetch<2>();
      } else if constexpr (Format::kAhead > 0) {
        const auto* const now =
            static_cast<const std::uint8_t*>(f.bytes(row)) + (g * f.steps() + step) * Format::kStepBytes;
        // Whatever lies there: every line, as a step of long vectors has more than one.
        for (std::int64_t i = 0; i < Format::kStepBytes; i += kLine) hwy::Prefetch(now + Format::kAhead + i);
      }
      for (int r = 0; r < R; ++r) {
        if constexpr (kLate) {
          group[r].raw(d, step, w[r][0], w[r][1]);
        } else {
          group[r].values(d, step, w[r][0], w[r][1]);
        }
      }
      const float* at = x + f.at(g, step) * M;
      add(w, at, at + f.apart() * M);
    }
    if constexpr (kLate) {
      for (int r = 0; r < R; ++r) {
        total[r] = hn::MulAdd(hn::Add(sums[r][0][0], sums[r][0][1]), group[r].scale, total[r]);
        sums[r][0][0] = sums[r][0][1] = hn::Zero(d);
      }
    }
  }
  if (f.rest() > 0) {
    for (int r = 0; r < R; ++r) f.rest_values(d, row + r, w[r][0], w[r][1]);
    const float* at = x + 2 * N * f.steps() * M;
    add(w, at, at + N * M);
  }

  constexpr int kResults = (R * M + 3) / 4 * 4;
  Vector<D> all[kResults];
  float results[kResults];
  for (int i = 0; i < kResults; ++i) {
    const int r = std::min(i, R * M - 1) / M, m = std::min(i, R * M - 1) % M;
    all[i] = kLate ? total[r] : kAlone ? hn::Add(sums[r][m][0], sums[r][m][kSums - 1]) : sums[r][m][0];
  }
  for (int i = 0; i < kResults; i += 4) sums_of_lanes(d, all[i], all[i + 1], all[i + 2], all[i + 3], results + i);
  for (int m = 0; m < std::min<std::int64_t>(M, to.M); ++m) {
    for (int r = 0; r < R; ++r) {
      float& y = to.y[m * to.stride + row + r];
      y = to.adds ? y + results[r * M + m] : results[r * M + m];
    }
  }
}

/// M rows of x, packed, and rows [begin, end) of w, R at a time.
template <int R, int M, class D, class Format>
HWY_NOINLINE void tiles(D d, const Format& f, const float* x, const Output& to, std::int64_t begin, std::int64_t end,
                        Ahead& ahead) {
  std::int64_t row = begin;
  for (; row + R <= end; row += R) tile<R, M>(d, f, x, to, row, ahead);
  for (; row < end; ++row) tile<1, M>(d, f, x, to, row, ahead);
}

/// Rows of w of most tiles.
constexpr std::int64_t kUsualRows = 4;

/// Whether there are the 32 registers of AVX-512, or 16.
constexpr bool kManyRegisters = kLanes<hn::ScalableTag<float>> == 16;

/// Rows of x that are computed together at most. With many registers, weights that are already numbers are read again
/// for the next rows, from the cache, in which the fewer rows of x leave room, and several rows of them share what is
/// read of x. Others are made numbers for as many as registers hold sums for.
template <class Format>
constexpr std::int64_t kTogether = kManyRegisters && Format::kNumbers ? 4 : 8;

/// Rows of x that are computed together where there are M: what there are tiles for.
inline std::int64_t rows_together(std::int64_t M) { return M <= 2 ? M : M <= 4 ? 4 : 8; }

/// The sizes of tiles are what registers hold.
template <class D, class Format>
void product_of_packed(D d, const Format& f, const float* x, const Output& to, std::int64_t begin, std::int64_t end,
                       Ahead& ahead) {
  switch (rows_together(to.M)) {
    case 1:
      return tiles<kUsualRows, 1>(d, f, x, to, begin, end, ahead);
    case 2:
      return tiles<kUsualRows, 2>(d, f, x, to, begin, end, ahead);
    case 4:
      return tiles<kManyRegisters ? kUsualRows : 2, 4>(d, f, x, to, begin, end, ahead);
    default:
      if constexpr (kTogether<Format> == 8) {
        constexpr int kRows = !kManyRegisters ? 1 : Format::kScaled ? 3 : 2;  // a compact block's masks take some, too
        return tiles<kRows, 8>(d, f, x, to, begin, end, ahead);
      }
  }
}

/// All of x with rows [begin, end) of w.
template <class D, class Format>
void product(D d, const Format& f, const Activations& to, std::int64_t begin, std::int64_t end) {
  const Packed packed(to, kTogether<Format>, kLanes<D>, rows_together);
  if (to.M == 1 && !Format::kScaled) {
    // Nothing is gained by rows side by side: w is read as it lies.
    Ahead none;
    return tiles<1, 1>(d, f, packed.from(0), {to.y, to.y_stride, 1, false}, begin, end, none);
  }
  const std::int64_t depth = Format::kScaled ? to.K : kBytesOfPart / static_cast<std::int64_t>(sizeof(float));
  const std::int64_t passes = (to.M + kTogether<Format> - 1) / kTogether<Format>;
  in_blocks(begin, end, [&](std::int64_t from, std::int64_t stop, std::int64_t next) HWY_ATTR {
    Ahead ahead(f.bytes(stop), f.bytes(next), kUsualRows * Format::kStepBytes / passes);
    for (std::int64_t k = 0; k < to.K; k += depth) {
      const Format part = f.part(k, std::min(depth, to.K - k));
      for (std::int64_t m = 0; m < to.M; m += kTogether<Format>) {
        const Output out{to.y + m * to.y_stride, to.y_stride, std::min(kTogether<Format>, to.M - m), k > 0};
        product_of_packed(d, part, packed.from(m) + k * rows_together(out.M), out, from, stop, ahead);
      }
    }
  });
}

/// The same for what is rare: less code, one row of x after the other.
template <class D, class Format>
void product_by_rows(D d, const Format& f, const Activations& to, std::int64_t begin, std::int64_t end) {
  Ahead none;
  for (std::int64_t m = 0; m < to.M; ++m) {
    const Output out{to.y + m * to.y_stride, to.y_stride, 1, false};
    tiles<2, 1>(d, f, to.x + m * to.x_stride, out, begin, end, none);
  }
}

/// The values of a vector where float32 is wanted, and where bfloat16 is: rounded to nearest, ties to even.
template <class D>
HWY_INLINE void store(D d, Vector<D> v, float* to) {
  hn::StoreU(v, d, to);
}

template <class D>
HWY_INLINE void store(D d, Vector<D> v, std::uint16_t* to) {
  hn::StoreU(upper_half(rounded_to_bfloat16(d, v)), hn::Rebind<std::uint16_t, D>(), to);
}

/// Rows [begin, end) of quantised weights as float32 or bfloat16.
template <class D, class Format, typename Out>
void widened(D d, const Format& f, std::int64_t K, Out* out, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row, out += K) {
    Vector<D> a, b;
    for (std::int64_t g = 0; g < f.groups(); ++g) {
      const auto group = f.template group<false>(row, g);
      for (std::int64_t step = 0; step < f.steps(); ++step) {
        group.values(d, step, a, b);
        store(d, a, out + f.at(g, step));
        store(d, b, out + f.at(g, step) + f.apart());
      }
    }
  }
}

/// Calls `use` with the longest vectors of which a group is a multiple of two, and whether these are the longest there
/// are. (Vectors of 4 fit any multiple of 8.)
template <class Use>
HWY_INLINE void with_vectors_for(std::int64_t group, Use use) {
  const hn::ScalableTag<float> longest;
  const hn::CappedTag<float, 8> eight;
  const hn::CappedTag<float, 4> four;
  if (group % (2 * kLanes<decltype(longest)>) == 0) return use(longest, std::true_type());
  if constexpr (kLanes<decltype(longest)> > 8) {
    if (group % 16 == 0) return use(eight, std::false_type());
  }
  use(four, std::false_type());
}

}  // namespace HWY_NAMESPACE
}  // namespace nanochat_x::kernels
HWY_AFTER_NAMESPACE();
#endif
