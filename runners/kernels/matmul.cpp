// Many rows of x: bound by arithmetic. Some rows of w at a time are written column by column, as float32, into a panel
// that stays in the second cache; a tile of y then adds, for each column, a vector of the panel times one value of x.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "matmul.cpp"
#include "targets.h"
// (must come first)
#include <hwy/foreach_target.h>
// (and then)
#include <hwy/highway.h>

#include <algorithm>
#include <type_traits>

#include "activations.h"
#include "checks.h"
#include "formats-inl.h"
#include "kernels.h"
#include "thread_space.h"

HWY_BEFORE_NAMESPACE();
namespace nanochat_x::kernels {
namespace HWY_NAMESPACE {

using D = hn::ScalableTag<float>;

// A tile is what registers hold sums for, of the 32 that AVX-512 has or of 16: so many rows of x by three vectors.
constexpr int kTileRows = kLanes<D> == 16 ? 8 : 4;
constexpr int kVectors = 3;
constexpr std::int64_t kPanel = kVectors * kLanes<D>;  // rows of w
static_assert(kPanelRows % kPanel == 0);
constexpr std::int64_t kDepth = 768;  // columns of w: with AVX-512 the panel takes 144 KiB

/// Columns [0, depth) of `rows` rows of w, column by column: panel[k * kPanel + row]. Rows that are missing are zero.
template <class Stored>
void fill_panel(const Stored* w, std::int64_t stride, std::int64_t rows, std::int64_t depth, float* panel) {
  std::int64_t done = 0;
#if HWY_TARGET != HWY_SCALAR
  const D d;
  const hn::RepartitionToWide<hn::RebindToUnsigned<D>> pairs;
  constexpr std::int64_t N = kLanes<D>;
  for (; rows == kPanel && done + N <= depth; done += N) {
    for (std::int64_t row = 0; row < kPanel; row += 4) {
      const Stored* p = w + row * stride + done;
      const auto a = load(d, p), b = load(d, p + stride), c = load(d, p + 2 * stride), e = load(d, p + 3 * stride);
      const auto ab = hn::BitCast(pairs, hn::InterleaveLower(d, a, b)),
                 ce = hn::BitCast(pairs, hn::InterleaveLower(d, c, e)),
                 ab2 = hn::BitCast(pairs, hn::InterleaveUpper(d, a, b)),
                 ce2 = hn::BitCast(pairs, hn::InterleaveUpper(d, c, e));
      // Of four columns in turn, those in each block of four lanes: the four rows of one column.
      alignas(64) float columns[4][N];
      hn::Store(hn::BitCast(d, hn::InterleaveLower(pairs, ab, ce)), d, columns[0]);
      hn::Store(hn::BitCast(d, hn::InterleaveUpper(pairs, ab, ce)), d, columns[1]);
      hn::Store(hn::BitCast(d, hn::InterleaveLower(pairs, ab2, ce2)), d, columns[2]);
      hn::Store(hn::BitCast(d, hn::InterleaveUpper(pairs, ab2, ce2)), d, columns[3]);
      for (std::int64_t k = 0; k < N; ++k) {
        const hn::CappedTag<float, 4> four;
        hn::Store(hn::Load(four, columns[k % 4] + k / 4 * 4), four, panel + (done + k) * kPanel + row);
      }
    }
  }
#endif
  for (std::int64_t row = 0; row < kPanel; ++row) {
    for (std::int64_t k = done; k < depth; ++k) {
      panel[k * kPanel + row] = row < rows ? value_of(w[row * stride + k]) : 0.0F;
    }
  }
}

/// y[m, n] of M rows of x and the panel.
template <int M>
HWY_INLINE void tile(const float* x, std::int64_t x_stride, const float* panel, std::int64_t depth, const Output& to) {
  const D d;
  Vector<D> sums[M][kVectors];
  for (auto& row : sums) {
    for (auto& sum : row) sum = hn::Zero(d);
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    Vector<D> w[kVectors];
    for (int i = 0; i < kVectors; ++i) w[i] = hn::Load(d, panel + k * kPanel + i * kLanes<D>);
    for (int m = 0; m < M; ++m) {
      const auto value = hn::Set(d, x[m * x_stride + k]);
      for (int i = 0; i < kVectors; ++i) sums[m][i] = hn::MulAdd(value, w[i], sums[m][i]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < kVectors; ++i) {
      float* y = to.y + m * to.stride + i * kLanes<D>;
      hn::StoreU(to.adds ? hn::Add(hn::LoadU(d, y), sums[m][i]) : sums[m][i], d, y);
    }
  }
}

/// The same of `columns` of the panel, the rest of which is not y's.
template <int M>
HWY_NOINLINE void columns_of_tile(const float* x, std::int64_t x_stride, const float* panel, std::int64_t depth,
                                  const Output& to, std::int64_t columns) {
  if (columns == kPanel) return tile<M>(x, x_stride, panel, depth, to);
  alignas(64) float whole[M * kPanel];
  for (int m = 0; m < M; ++m)
    std::fill(std::copy_n(to.y + m * to.stride, columns, whole + m * kPanel), whole + (m + 1) * kPanel, 0.0F);
  tile<M>(x, x_stride, panel, depth, {whole, kPanel, M, to.adds});
  for (int m = 0; m < M; ++m) std::copy_n(whole + m * kPanel, columns, to.y + m * to.stride);
}

template <class Stored>
void product(const Activations& a, const Stored* w, std::int64_t begin, std::int64_t end) {
  float* const panel = thread_space(kPanel * std::min(kDepth, a.K));
  for (; begin < end; begin += kPanel) {
    const std::int64_t columns = std::min(kPanel, end - begin);
    for (std::int64_t k = 0; k < a.K; k += kDepth) {
      const std::int64_t depth = std::min(kDepth, a.K - k);
      fill_panel(w + begin * a.K + k, a.K, columns, depth, panel);
      std::int64_t m = 0;
      const auto tiles = [&](auto rows) HWY_ATTR {
        constexpr int M = rows;
        for (; m + M <= a.M; m += M) {
          columns_of_tile<M>(a.x + m * a.x_stride + k, a.x_stride, panel, depth,
                             {a.y + m * a.y_stride + begin, a.y_stride, M, k > 0}, columns);
        }
      };
      tiles(std::integral_constant<int, kTileRows>());
      if constexpr (kTileRows > 4) tiles(std::integral_constant<int, 4>());
      tiles(std::integral_constant<int, 1>());
    }
  }
}

void matmul_plain(const Activations& a, const void* w, Type type, std::int64_t begin, std::int64_t end) {
  with_plain(a.K, w, type, [&](const auto& f) HWY_ATTR { product(a, f.w, begin, end); });
}

}  // namespace HWY_NAMESPACE
}  // namespace nanochat_x::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace nanochat_x::kernels {

HWY_EXPORT(matmul_plain);

void matmul(const float* x, std::int64_t M, std::int64_t K, const void* w, Type type, float* y, std::int64_t y_stride,
            std::int64_t begin, std::int64_t end) {
  if (M < 1) throw Error("a product takes 1 row or more; got " + std::to_string(M));
  check_width(K);
  check_rows(begin, end);
  HWY_DYNAMIC_DISPATCH(matmul_plain)({x, K, M, K, y, y_stride}, w, type, begin, end);
}

}  // namespace nanochat_x::kernels
#endif
