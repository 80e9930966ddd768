// One row of x in integers of 16 bits with weights of int8 and int4, made such integers too: twice the products an
// instruction that float32 has.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "linear_int16.cpp"
#include "targets.h"
// (must come first)
#include <hwy/foreach_target.h>
// (and then)
#include <hwy/highway.h>

#include <algorithm>
#include <type_traits>

#include "blocks.h"
#include "formats-inl.h"
#include "integers.h"
#include "sums-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nanochat_x::kernels {
namespace HWY_NAMESPACE {

using Floats = hn::ScalableTag<float>;
using Words = hn::RebindToSigned<Floats>;
#if HWY_TARGET == HWY_SCALAR
using Halves = hn::Rebind<std::int16_t, Words>;
#else
using Halves = hn::Repartition<std::int16_t, Words>;
#endif
constexpr std::int64_t kHalves = static_cast<std::int64_t>(hn::MaxLanes(Halves()));

/// A row of int8. kOne: a group is one vector.
template <bool kOne>
struct Bytes {
  static constexpr std::int64_t kBits = 8;
  static constexpr int kRows = 1;  // rows: bound by memory, which is read best as it lies
  const std::int8_t* p;
  std::int64_t group;

  /// Calls `use(offset, weights)` for each vector of group g.
  template <class Use>
  HWY_INLINE void each(std::int64_t g, Use use) const {
    const std::int64_t size = kOne ? kHalves : group;
    for (std::int64_t i = 0; i < size; i += kHalves) {
      use(i, hn::PromoteTo(Halves(), hn::LoadU(hn::Rebind<std::int8_t, Halves>(), p + g * size + i)));
    }
  }
};

/// What the 16 values of 4 bits mean behind each zero point, twice, so that bit 4 of an index does not matter.
struct Meanings {
  alignas(64) std::int16_t of[16][32];
  constexpr Meanings() : of() {
    for (int zero = 0; zero < 16; ++zero) {
      for (int i = 0; i < 32; ++i) of[zero][i] = static_cast<std::int16_t>(i % 16 - zero);
    }
  }
};
constexpr Meanings kMeanings;

/// A row of 4 bits. kOne: a group is one vector, made of both halves of its bytes.
template <bool kOne>
struct Nibbles {
  static constexpr std::int64_t kBits = 4;
  static constexpr int kRows = 4;  // rows: bound by arithmetic
  const std::uint8_t* p;
  const std::uint8_t* zeros;
  std::int64_t group;
  static constexpr bool kTable = HWY_TARGET <= HWY_AVX3 && kHalves == 32;
  using Indices = hn::RebindToUnsigned<Halves>;
  using Stored = hn::Rebind<std::uint8_t, Halves>;

  /// Of indices whose bits from 5 on are cleared, or from 4 on without a table.
  HWY_INLINE static hn::Vec<Halves> meaning(hn::Vec<Indices> index, std::int64_t zero) {
#if HWY_TARGET <= HWY_AVX3
    if constexpr (kTable) {
      const auto table = hn::Load(Halves(), kMeanings.of[zero]);
      return hn::Vec<Halves>{_mm512_permutexvar_epi16(index.raw, table.raw)};
    }
#endif
    const auto low = hn::And(index, hn::Set(Indices(), 15));
    return hn::Sub(hn::BitCast(Halves(), low), hn::Set(Halves(), static_cast<std::int16_t>(zero)));
  }

  template <class Use>
  HWY_INLINE void each(std::int64_t g, Use use) const {
#if HWY_TARGET != HWY_SCALAR
    if constexpr (kOne) {
      const hn::Half<Stored> half;
      const auto once = hn::LoadU(half, p + g * (kHalves / 2));
      const auto both = hn::PromoteTo(Indices(), hn::Combine(Stored(), once, once));
      use(0, meaning(hn::ConcatUpperLower(Indices(), hn::ShiftRight<4>(both), both), zeros[g]));
      return;
    }
#endif
    for (std::int64_t i = 0; i < group / 2; i += kHalves) {
      const auto bytes = hn::PromoteTo(Indices(), hn::LoadU(Stored(), p + g * group / 2 + i));
      use(i, meaning(bytes, zeros[g]));
      use(group / 2 + i, meaning(hn::ShiftRight<4>(bytes), zeros[g]));
    }
  }
};

/// y[0] to y[R - 1], of R rows of w whose scales begin at `scales`.
template <int R, class Row>
HWY_INLINE void tile(const Row (&w)[R], const QuantizedRow& x, std::int64_t groups, std::int64_t group,
                     const std::uint16_t* scales, float* y) {
  const Floats floats;
  Ahead next;  // one row after the other needs none
  if constexpr (R > 1) {
    const std::int64_t step = R * group * Row::kBits / 8;
    const auto* const behind = reinterpret_cast<const char*>(w[0].p) + groups * step;
    next = Ahead(behind, behind + groups * step, step);
  }
  constexpr std::int64_t kTogether = 64;  // groups whose scales are multiplied at once
  hn::Vec<Floats> total[4];
  for (auto& t : total) t = hn::Zero(floats);
  for (std::int64_t first = 0; first < groups; first += kTogether) {
    const std::int64_t count = std::min(kTogether, groups - first);
    alignas(64) float both[R][kTogether];
    for (int r = 0; r < R; ++r) {
      const std::uint16_t* of_row = scales + r * groups + first;
      std::int64_t i = 0;
      for (; i + kLanes<Floats> <= count; i += kLanes<Floats>) {
        const auto wide = load(floats, reinterpret_cast<const hwy::bfloat16_t*>(of_row) + i);
        hn::Store(hn::Mul(wide, hn::LoadU(floats, x.scales() + first + i)), floats, both[r] + i);
      }
      for (; i < count; ++i) both[r][i] = float_of(of_row[i]) * x.scales()[first + i];
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int16_t* of_x = x.q() + (first + i) * group;
      next.fetch<1>();
      for (int r = 0; r < R; ++r) {
        auto even = hn::Zero(Words()), odd = hn::Zero(Words());
        w[r].each(first + i, [&](std::int64_t offset, hn::Vec<Halves> weights) HWY_ATTR {
          even = hn::ReorderWidenMulAccumulate(Words(), weights, hn::LoadU(Halves(), of_x + offset), even, odd);
        });
        total[r] = hn::MulAdd(hn::ConvertTo(floats, hn::Add(even, odd)), hn::Set(floats, both[r][i]), total[r]);
      }
    }
  }
  float results[4];
  sums_of_lanes(floats, total[0], total[1], total[2], total[3], results);
  std::copy_n(results, R, y);
}

/// Rows [begin, end), where row(n) is row n.
template <class MakeRow>
HWY_INLINE void product(const MakeRow& row, const QuantizedRow& x, std::int64_t groups, std::int64_t group,
                        const std::uint16_t* scales, float* y, std::int64_t begin, std::int64_t end) {
  using Row = decltype(row(begin));
  const auto tiles_of = [&](auto count) HWY_ATTR {
    constexpr int R = count;
    for (; begin + R <= end; begin += R) {
      Row rows[R];
      for (int r = 0; r < R; ++r) rows[r] = row(begin + r);
      tile(rows, x, groups, group, scales + begin * groups, y + begin);
    }
  };
  tiles_of(std::integral_constant<int, Row::kRows>());
  tiles_of(std::integral_constant<int, 1>());
}

bool takes_int8(std::int64_t group) { return group % kHalves == 0; }
bool takes_int4(std::int64_t group) { return group % (2 * kHalves) == 0 || (group == kHalves && kHalves > 1); }

template <bool kOne>
HWY_NOINLINE void rows_of_int8(const QuantizedRow& x, std::int64_t K, const std::int8_t* q, const std::uint16_t* scales,
                               std::int64_t group, float* y, std::int64_t begin, std::int64_t end) {
  const auto row = [=](std::int64_t n) HWY_ATTR { return Bytes<kOne>{q + n * K, group}; };
  product(row, x, K / group, group, scales, y, begin, end);
}

template <bool kOne>
HWY_NOINLINE void rows_of_int4(const QuantizedRow& x, std::int64_t K, const std::uint8_t* q,
                               const std::uint16_t* scales, const std::uint8_t* zeros, std::int64_t group, float* y,
                               std::int64_t begin, std::int64_t end) {
  const std::int64_t groups = K / group;
  const auto row = [=](std::int64_t n) HWY_ATTR { return Nibbles<kOne>{q + n * (K / 2), zeros + n * groups, group}; };
  product(row, x, groups, group, scales, y, begin, end);
}

void words(const QuantizedRow& x, const QuantizedWeights& w, float* y, std::int64_t begin, std::int64_t end) {
  const std::int64_t K = x.size(), group = x.group();
  const bool one = group == kHalves;
  if (x.bits() == 8) {
    const auto* q = reinterpret_cast<const std::int8_t*>(w.q);
    return one ? rows_of_int8<true>(x, K, q, w.scales, group, y, begin, end)
               : rows_of_int8<false>(x, K, q, w.scales, group, y, begin, end);
  }
  return one ? rows_of_int4<true>(x, K, w.q, w.scales, w.zeros, group, y, begin, end)
             : rows_of_int4<false>(x, K, w.q, w.scales, w.zeros, group, y, begin, end);
}

}  // namespace HWY_NAMESPACE
}  // namespace nanochat_x::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace nanochat_x::kernels {

HWY_EXPORT(takes_int8);
HWY_EXPORT(takes_int4);
HWY_EXPORT(words);

bool takes_words(int bits, std::int64_t group) {
  return bits == 8 ? HWY_DYNAMIC_DISPATCH(takes_int8)(group) : HWY_DYNAMIC_DISPATCH(takes_int4)(group);
}

void product_of_words(const QuantizedRow& x, const QuantizedWeights& w, float* y, std::int64_t begin,
                      std::int64_t end) {
  HWY_DYNAMIC_DISPATCH(words)(x, w, y, begin, end);
}

}  // namespace nanochat_x::kernels
#endif
