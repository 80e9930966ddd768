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
#include "formats-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nanochat_x::kernels {
namespace HWY_NAMESPACE {

/// y[m, row + r] for R rows of w and M of x at once: each vector of w is used for all rows of x, and each of x for all
/// rows of w. Rows of x that there are not (M is rounded up) are the last one again.
template <int R, int M, class D, class Format>
HWY_INLINE void tile(D d, const Format& f, const Activations& to, std::int64_t m0, std::int64_t row) {
  // One row of x alone would leave too few sums in flight: those of both vectors of a step are kept apart. It also
  // makes it worth while to scale sums rather than weights.
  constexpr bool kAlone = M == 1;
  constexpr bool kLate = kAlone && Format::kScaled;
  constexpr int kSums = kAlone ? 2 : 1;
  const std::int64_t rows = std::min<std::int64_t>(M, to.M - m0);
  const float* x[M];
  for (int m = 0; m < M; ++m) x[m] = to.x + (m0 + std::min<std::int64_t>(m, rows - 1)) * to.x_stride;

  Vector<D> sums[R][M][kSums], total[R];
  for (int r = 0; r < R; ++r) {
    total[r] = hn::Zero(d);
    for (int m = 0; m < M; ++m) {
      for (int i = 0; i < kSums; ++i) sums[r][m][i] = hn::Zero(d);
    }
  }
  const auto add = [&](const Vector<D>(&w)[R][2], const float* const* from, std::int64_t a, std::int64_t b) HWY_ATTR {
    for (int m = 0; m < M; ++m) {
      const auto xa = hn::LoadU(d, from[m] + a);
      for (int r = 0; r < R; ++r) sums[r][m][0] = hn::MulAdd(w[r][0], xa, sums[r][m][0]);
    }
    for (int m = 0; m < M; ++m) {
      const auto xb = hn::LoadU(d, from[m] + b);
      for (int r = 0; r < R; ++r) sums[r][m][kSums - 1] = hn::MulAdd(w[r][1], xb, sums[r][m][kSums - 1]);
    }
  };

  for (std::int64_t g = 0; g < f.groups(); ++g) {
    typename Format::Group group[R];
    for (int r = 0; r < R; ++r) group[r] = f.group(row + r, g);
    for (std::int64_t step = 0; step < f.steps(); ++step) {
      Vector<D> w[R][2];
      for (int r = 0; r < R; ++r) {
        if constexpr (kLate) {
          group[r].raw(d, step, w[r][0], w[r][1]);
        } else {
          group[r].values(d, step, w[r][0], w[r][1]);
        }
      }
      add(w, x, f.at(g, step), f.at(g, step) + f.apart());
    }
    if constexpr (kLate) {
      for (int r = 0; r < R; ++r) {
        total[r] = hn::MulAdd(hn::Add(sums[r][0][0], sums[r][0][1]), group[r].scale, total[r]);
        sums[r][0][0] = sums[r][0][1] = hn::Zero(d);
      }
    }
  }
  if (f.rest() > 0) {
    float padded[M][2 * kLanes<D>] = {};
    const float* from[M];
    for (int m = 0; m < M; ++m) from[m] = std::copy_n(x[m] + to.K - f.rest(), f.rest(), padded[m]) - f.rest();
    Vector<D> w[R][2];
    for (int r = 0; r < R; ++r) f.rest_values(d, row + r, w[r][0], w[r][1]);
    add(w, from, 0, kLanes<D>);
  }
  for (int m = 0; m < rows; ++m) {
    for (int r = 0; r < R; ++r) {
      const auto all = kLate ? total[r] : kAlone ? hn::Add(sums[r][m][0], sums[r][m][kSums - 1]) : sums[r][m][0];
      to.y[(m0 + m) * to.y_stride + row + r] = hn::GetLane(hn::SumOfLanes(d, all));
    }
  }
}

/// M rows of x from m0 on, R rows of w at a time.
template <int R, int M, class D, class Format>
HWY_NOINLINE void tiles(D d, const Format& f, const Activations& to, std::int64_t m0, std::int64_t begin,
                        std::int64_t end) {
  std::int64_t row = begin;
  for (; row + R <= end; row += R) tile<R, M>(d, f, to, m0, row);
  for (; row < end; ++row) tile<1, M>(d, f, to, m0, row);
}

/// All of x with rows [begin, end) of w. The sizes of tiles are what registers hold: 32, or the 16 of AVX2.
template <class D, class Format>
void product(D d, const Format& f, const Activations& to, std::int64_t begin, std::int64_t end) {
  constexpr bool kMany = kLanes<D> == 16;
  constexpr std::int64_t kMostTogether = 8;
  constexpr std::int64_t kRows = 24;  // of w, which stay in the cache until all of x is done; a multiple of R
  for (; begin < end; begin += kRows) {
    const std::int64_t stop = std::min(end, begin + kRows);
    for (std::int64_t m = 0; m < to.M; m += kMostTogether) {
      const std::int64_t together = to.M - m;
      if (together == 1) {
        tiles<4, 1>(d, f, to, m, begin, stop);
      } else if (together == 2) {
        tiles<4, 2>(d, f, to, m, begin, stop);
      } else if (together <= 4) {
        tiles<kMany ? 4 : 2, 4>(d, f, to, m, begin, stop);
      } else {
        tiles<kMany ? 3 : 1, 8>(d, f, to, m, begin, stop);
      }
    }
  }
}

/// The same for what is rare: less code, one row of x after the other.
template <class D, class Format>
void product_by_rows(D d, const Format& f, const Activations& to, std::int64_t begin, std::int64_t end) {
  for (std::int64_t m = 0; m < to.M; ++m) tiles<2, 1>(d, f, to, m, begin, end);
}

/// Rows [begin, end) as float32.
template <class D, class Format>
void widened(D d, const Format& f, std::int64_t K, float* out, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row, out += K) {
    Vector<D> a, b;
    for (std::int64_t g = 0; g < f.groups(); ++g) {
      const auto group = f.group(row, g);
      for (std::int64_t step = 0; step < f.steps(); ++step) {
        group.values(d, step, a, b);
        hn::StoreU(a, d, out + f.at(g, step));
        hn::StoreU(b, d, out + f.at(g, step) + f.apart());
      }
    }
    if (f.rest() > 0) {
      float rest[2 * kLanes<D>];
      f.rest_values(d, row, a, b);
      hn::StoreU(a, d, rest);
      hn::StoreU(b, d, rest + kLanes<D>);
      std::copy_n(rest, f.rest(), out + K - f.rest());
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
