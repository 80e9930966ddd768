// Weights of nanochat_x/compact.py: float32 whose exponents take 4 bits.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "linear_compact.cpp"
#include "targets.h"
// (must come first)
#include <hwy/foreach_target.h>
// (and then)
#include <hwy/highway.h>

#include <algorithm>

#include "checks.h"
#include "compact.h"
#include "kernels.h"
#include "linear-inl.h"
#include "thread_space.h"

HWY_BEFORE_NAMESPACE();
namespace nanochat_x::kernels {
namespace HWY_NAMESPACE {

using D = hn::ScalableTag<float>;

/// A block of columns is a group, whose values at `apart()` have their exponents in the other halves of the same bytes.
struct CompactRows {
  static constexpr bool kScaled = false, kNumbers = false;
  static constexpr std::int64_t kStepBytes = 7 * kLanes<D>;
  // Its instructions leave a processor room to look ahead over few lines only. On 2 cores of an AMD EPYC (Zen 3), 400
  // MB, turn and turn about: 1.11 to 1.18 times the speed for one row of x, 1.04 to 1.13 for 8; 1 to 6 KiB are alike.
  // With AVX-512 (2 cores of an Intel Xeon, Emerald Rapids) 6 KiB, in every line, are 1.24 to 1.28 times the speed of
  // 1.5 KiB in one line a step, for one row; 3 KiB 1.15 to 1.21.
  static constexpr std::int64_t kAhead = 6144;
  static constexpr std::int64_t kUpper = 2 * kCompactBlock;  // where the parts of a block begin
  static constexpr std::int64_t kCodes = kUpper + kCompactBlock;
  static constexpr std::int64_t kBlockBytes = kCodes + kCompactBlock / 2;
  /// What of a float32 is not its exponent.
  static constexpr std::uint32_t kSignAndMantissa = 0x807FFFFF;
  using Words = hn::RebindToUnsigned<D>;

  const std::uint8_t *blocks, *bases;
  std::int64_t K, stride;

  struct Group {
    const std::uint8_t* block;
    Vector<Words> base;

    /// Values from `at` on, whose exponents, less the base, are codes << 23.
    HWY_INLINE Vector<D> value(D d, std::int64_t at, Vector<Words> exponents) const {
      const hn::RebindToSigned<D> words;
      const auto* upper = reinterpret_cast<const std::int8_t*>(block + kUpper) + at;
      // The sign is spread over the exponent's bits, of which only the highest, its own, stays.
      auto bits =
          hn::BitCast(Words(), hn::ShiftLeft<16>(hn::PromoteTo(words, hn::LoadU(hn::Rebind<std::int8_t, D>(), upper))));
      bits = hn::And(bits, hn::Set(Words(), kSignAndMantissa));
      const auto* low = reinterpret_cast<const std::uint16_t*>(block) + at;
      bits = hn::Or(bits, hn::PromoteTo(Words(), hn::LoadU(hn::Rebind<std::uint16_t, D>(), low)));
      return hn::BitCast(d, hn::Add(bits, hn::Add(exponents, base)));
    }

    HWY_INLINE void values(D d, std::int64_t step, Vector<D>& a, Vector<D>& b) const {
      const std::int64_t at = kLanes<D> * step;
      const auto both = hn::PromoteTo(Words(), hn::LoadU(hn::Rebind<std::uint8_t, D>(), block + kCodes + at));
      const auto code = hn::Set(Words(), 15U << 23);
      a = value(d, at, hn::And(hn::ShiftLeft<23>(both), code));
      b = value(d, at + kCompactBlock / 2, hn::And(hn::ShiftLeft<19>(both), code));
    }
    HWY_INLINE void raw(D d, std::int64_t step, Vector<D>& a, Vector<D>& b) const { values(d, step, a, b); }
  };

  HWY_INLINE const void* bytes(std::int64_t row) const { return blocks + row * stride; }
  /// Columns from a block's begin on.
  HWY_INLINE CompactRows part(std::int64_t k, std::int64_t count) const {
    return {blocks + k / kCompactBlock * kBlockBytes, bases, count, stride};
  }
  HWY_INLINE std::int64_t groups() const { return K / kCompactBlock; }
  HWY_INLINE static constexpr std::int64_t steps() { return kCompactBlock / (2 * kLanes<D>); }
  HWY_INLINE std::int64_t at(std::int64_t g, std::int64_t step) const { return g * kCompactBlock + kLanes<D> * step; }
  HWY_INLINE static constexpr std::int64_t apart() { return kCompactBlock / 2; }
  HWY_INLINE static constexpr std::int64_t rest() { return 0; }
  HWY_INLINE void rest_values(D, std::int64_t, Vector<D>&, Vector<D>&) const {}

  template <bool kRaw>
  HWY_INLINE Group group(std::int64_t row, std::int64_t g) const {
    return {blocks + row * stride + g * kBlockBytes, hn::Set(Words(), std::uint32_t{bases[row]} << 23)};
  }
};

HWY_INLINE CompactRows rows_of(const Compact& w) { return {w.blocks, w.bases, w.K, w.row_bytes()}; }

/// What a block has in the place of an exception.
HWY_INLINE float value_of_zeros(const Compact& w, std::int64_t row) {
  return std::bit_cast<float>(std::uint32_t{w.bases[row]} << 23);
}

void product_compact(const Activations& to, const Compact& w, std::int64_t begin, std::int64_t end) {
  product(D(), rows_of(w), to, begin, end);
  for (std::int64_t row = begin; row < end; ++row) {
    const Exceptions all = exceptions_of(w, row);
    for (std::int64_t i = all.begin; i < all.end; ++i) {
      const std::int64_t column = column_of(w, i);
      const float missing = w.values[i] - value_of_zeros(w, row);
      for (std::int64_t m = 0; m < to.M; ++m) to.y[m * to.y_stride + row] += to.x[m * to.x_stride + column] * missing;
    }
  }
}

void floats_of_compact(const Compact& w, float* out, std::int64_t begin, std::int64_t end) {
  widened(D(), rows_of(w), w.K, out, begin, end);
  for (std::int64_t row = begin; row < end; ++row, out += w.K) {
    const Exceptions all = exceptions_of(w, row);
    for (std::int64_t i = all.begin; i < all.end; ++i) out[column_of(w, i)] = w.values[i];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace nanochat_x::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace nanochat_x::kernels {

HWY_EXPORT(product_compact);
HWY_EXPORT(floats_of_compact);

void linear_compact(const float* x, std::int64_t M, const Compact& w, float* y, std::int64_t y_stride,
                    std::int64_t begin, std::int64_t end) {
  check_batch(M);
  check_compact(w);
  check_rows(begin, end);
  HWY_DYNAMIC_DISPATCH(product_compact)({x, w.K, M, w.K, y, y_stride}, w, begin, end);
}

void widen_compact(const Compact& w, float* out, std::int64_t begin, std::int64_t end) {
  check_compact(w);
  check_rows(begin, end);
  HWY_DYNAMIC_DISPATCH(floats_of_compact)(w, out, begin, end);
}

void matmul(const float* x, std::int64_t M, const Compact& w, float* y, std::int64_t y_stride, std::int64_t begin,
            std::int64_t end) {
  check_compact(w);
  check_rows(begin, end);
  for (; begin < end; begin += kPanelRows) {
    const std::int64_t rows = std::min(kPanelRows, end - begin);
    float* const panel = thread_space<float, Space::weights>(rows * w.K);
    widen_compact(w, panel, begin, begin + rows);
    matmul(x, M, w.K, panel, Type::float32, y + begin, y_stride, 0, rows);
  }
}

}  // namespace nanochat_x::kernels
#endif
