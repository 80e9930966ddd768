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

#include "activations.h"
#include "checks.h"
#include "kernels.h"
#include "thread_space.h"
#include "tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nanochat_x::kernels {
namespace HWY_NAMESPACE {

static_assert(kPanelRows % kPanel == 0);
constexpr std::int64_t kDepth = 768;  // columns of w: with AVX-512 the panel takes 144 KiB

/// The same of `columns` of the panel, the rest of which is not y's.
template <int M>
HWY_NOINLINE void columns_of_tile(const float* x, std::int64_t x_stride, const float* panel, std::int64_t depth,
                                  const Output& to, std::int64_t columns) {
  const D d;
  if (columns == kPanel) return tile<M, kVectors>(d, x, x_stride, panel, kPanel, depth, to);
  alignas(64) float whole[M * kPanel];
  for (int m = 0; m < M; ++m)
    std::fill(std::copy_n(to.y + m * to.stride, columns, whole + m * kPanel), whole + (m + 1) * kPanel, 0.0F);
  tile<M, kVectors>(d, x, x_stride, panel, kPanel, depth, {whole, kPanel, M, to.adds});
  for (int m = 0; m < M; ++m) std::copy_n(whole + m * kPanel, columns, to.y + m * to.stride);
}

template <class Stored>
void product(const Activations& a, const Stored* w, std::int64_t begin, std::int64_t end) {
  float* const panel = thread_space<float, Space::work>(kPanel * std::min(kDepth, a.K));
  for (; begin < end; begin += kPanel) {
    const std::int64_t columns = std::min(kPanel, end - begin);
    for (std::int64_t k = 0; k < a.K; k += kDepth) {
      const std::int64_t depth = std::min(kDepth, a.K - k);
      fill_panel(w + begin * a.K + k, a.K, columns, depth, panel);
      in_tiles(0, a.M, [&](std::int64_t m, auto rows) HWY_ATTR {
        columns_of_tile<rows>(a.x + m * a.x_stride + k, a.x_stride, panel, depth,
                              {a.y + m * a.y_stride + begin, a.y_stride, rows, k > 0}, columns);
      });
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
