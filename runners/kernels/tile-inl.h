// A panel, some rows of a matrix column by column as float32, and the tile of a product with it that registers hold.
// Compiled once an instruction set (foreach_target.h).
#if defined(NANOCHAT_X_KERNELS_TILE_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NANOCHAT_X_KERNELS_TILE_INL_H
#undef NANOCHAT_X_KERNELS_TILE_INL_H
#else
#define NANOCHAT_X_KERNELS_TILE_INL_H
#endif

#include <hwy/highway.h>

#include <type_traits>

#include "activations.h"
#include "formats-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nanochat_x::kernels {
namespace HWY_NAMESPACE {

using D = hn::ScalableTag<float>;

// A tile is what registers hold sums for, of the 32 that AVX-512 has or of 16: so many rows of x by three vectors.
constexpr int kTileRows = kLanes<D> == 16 ? 8 : 4;
constexpr int kVectors = 3;
constexpr std::int64_t kPanel = kVectors * kLanes<D>;  // rows of w

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

/// y[m, n] = sum over k < depth of x[m, k] w[k, n], of M rows of x and V vectors of columns: w is row-major here, as a
/// panel is with a stride of kPanel.
template <int M, int V, class Lanes>
HWY_INLINE void tile(Lanes d, const float* x, std::int64_t x_stride, const float* w, std::int64_t w_stride,
                     std::int64_t depth, const Output& to) {
  Vector<Lanes> sums[M][V];
  for (auto& row : sums) {
    for (auto& sum : row) sum = hn::Zero(d);
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    Vector<Lanes> columns[V];
    for (int i = 0; i < V; ++i) columns[i] = hn::LoadU(d, w + k * w_stride + i * kLanes<Lanes>);
    for (int m = 0; m < M; ++m) {
      const auto value = hn::Set(d, x[m * x_stride + k]);
      for (int i = 0; i < V; ++i) sums[m][i] = hn::MulAdd(value, columns[i], sums[m][i]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < V; ++i) {
      float* y = to.y + m * to.stride + i * kLanes<Lanes>;
      hn::StoreU(to.adds ? hn::Add(hn::LoadU(d, y), sums[m][i]) : sums[m][i], d, y);
    }
  }
}

/// Calls use(first row, number of rows as a constant) for [begin, end) in tiles of as many rows as registers hold.
template <class Use>
HWY_INLINE void in_tiles(std::int64_t begin, std::int64_t end, Use use) {
  const auto tiles = [&](auto rows) HWY_ATTR {
    for (; begin + rows <= end; begin += rows) use(begin, rows);
  };
  tiles(std::integral_constant<int, kTileRows>());
  if constexpr (kTileRows > 4) tiles(std::integral_constant<int, 4>());
  tiles(std::integral_constant<int, 1>());
}

}  // namespace HWY_NAMESPACE
}  // namespace nanochat_x::kernels
HWY_AFTER_NAMESPACE();
#endif
