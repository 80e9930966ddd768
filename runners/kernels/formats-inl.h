// How each format of weights becomes vectors of float32. Compiled once an instruction set (foreach_target.h).
//
// A row is `groups()` groups of `steps()` steps; a step yields two vectors, of the values at `at(group, step)` and at
// `apart()` behind them. Of group<true>(...) Group::raw gives what is stored, to be multiplied by `scale` once a group;
// of group<false>(...) Group::values gives the weights themselves. kScaled says that raw is no weight yet, kNumbers
// that what is stored are weights. bytes(row) is where a row begins, of which a step reads kStepBytes. part(k, count)
// is some columns, of what is not kScaled. kAhead: bytes behind a step that are asked for with it, where a row is read
// alone; 0 where the processor sees by itself what comes.
#if defined(NANOCHAT_X_KERNELS_FORMATS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NANOCHAT_X_KERNELS_FORMATS_INL_H
#undef NANOCHAT_X_KERNELS_FORMATS_INL_H
#else
#define NANOCHAT_X_KERNELS_FORMATS_INL_H
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>

#include "bfloat16.h"
#include "blocks.h"
#include "kernels.h"

HWY_BEFORE_NAMESPACE();
namespace nanochat_x::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class D>
using Vector = hn::Vec<D>;

template <class D>
constexpr std::int64_t kLanes = static_cast<std::int64_t>(hn::MaxLanes(D()));

HWY_INLINE float value_of(float v) { return v; }

template <class Half>  // hwy::bfloat16_t or hwy::float16_t
HWY_INLINE float value_of(const Half& v) {
  const hn::CappedTag<float, 1> d;
  return hn::GetLane(hn::PromoteTo(d, hn::LoadU(hn::Rebind<Half, decltype(d)>(), &v)));
}

template <class D>
HWY_INLINE Vector<D> load(D d, const float* p) {
  return hn::LoadU(d, p);
}

template <class D, class Half>  // hwy::bfloat16_t or hwy::float16_t
HWY_INLINE Vector<D> load(D d, const Half* p) {
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<Half, D>(), p));
}

/// The bits of numbers, rounded to nearest, ties to even, to those of bfloat16, which are their upper halves then.
template <class D>
HWY_INLINE Vector<hn::RebindToUnsigned<D>> rounded_to_bfloat16(D, Vector<D> v) {
  const hn::RebindToUnsigned<D> words;
  const auto bits = hn::BitCast(words, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(words, 1));
  return hn::Add(bits, hn::Add(odd, hn::Set(words, 0x7FFF)));
}

template <class V>
HWY_INLINE auto upper_half(V words) {
  return hn::TruncateTo(hn::Rebind<std::uint16_t, hn::DFromV<V>>(), hn::ShiftRight<16>(words));
}

/// float32, bfloat16 and float16: one group. Its last `rest()` values, fewer than a step, are not part of it.
template <class D, class Stored>
struct Plain {
  static constexpr bool kScaled = false, kNumbers = true;
  static constexpr std::int64_t kStepBytes = 2 * kLanes<D> * static_cast<std::int64_t>(sizeof(Stored));
  // (in 16 bits, 2 cores of an Intel Xeon, Emerald Rapids: 1.4 times as fast as what the processor sees by itself)
  static constexpr std::int64_t kAhead = sizeof(Stored) == 2 ? kBytesAhead : 0;
  const Stored* w;
  std::int64_t K, stride;

  struct Group {
    const Stored* p;
    HWY_INLINE void raw(D d, std::int64_t step, Vector<D>& a, Vector<D>& b) const {
      a = load(d, p + 2 * kLanes<D> * step);
      b = load(d, p + 2 * kLanes<D> * step + kLanes<D>);
    }
    HWY_INLINE void values(D d, std::int64_t step, Vector<D>& a, Vector<D>& b) const { raw(d, step, a, b); }
  };

  HWY_INLINE const void* bytes(std::int64_t row) const { return w + row * stride; }
  /// Columns [k, k + count) of each row.
  HWY_INLINE Plain part(std::int64_t k, std::int64_t count) const { return {w + k, count, stride}; }
  HWY_INLINE std::int64_t groups() const { return 1; }
  HWY_INLINE std::int64_t steps() const { return K / (2 * kLanes<D>); }
  HWY_INLINE std::int64_t at(std::int64_t, std::int64_t step) const { return 2 * kLanes<D> * step; }
  HWY_INLINE std::int64_t apart() const { return kLanes<D>; }
  HWY_INLINE std::int64_t rest() const { return K % (2 * kLanes<D>); }
  template <bool kRaw>
  HWY_INLINE Group group(std::int64_t row, std::int64_t) const {
    return {w + row * stride};
  }

  /// As a step, of the rest of a row and zeros behind it.
  HWY_INLINE void rest_values(D d, std::int64_t row, Vector<D>& a, Vector<D>& b) const {
    Stored padded[2 * kLanes<D>] = {};
    std::copy_n(w + row * stride + K - rest(), rest(), padded);
    Group{padded}.values(d, 0, a, b);
  }
};

/// Calls `use` with the format of weights that are not quantised.
template <class Use>
HWY_INLINE void with_plain(std::int64_t K, const void* w, Type type, Use use) {
  using D = hn::ScalableTag<float>;
  switch (type) {
    case Type::float32:
      return use(Plain<D, float>{static_cast<const float*>(w), K, K});
    case Type::bfloat16:
      return use(Plain<D, hwy::bfloat16_t>{static_cast<const hwy::bfloat16_t*>(w), K, K});
    case Type::float16:
      return use(Plain<D, hwy::float16_t>{static_cast<const hwy::float16_t*>(w), K, K});
  }
}

/// Of whole groups: nothing is left of a row.
template <class D>
struct Grouped {
  std::int64_t K, group_size;
  HWY_INLINE std::int64_t groups() const { return K / group_size; }
  HWY_INLINE static constexpr std::int64_t rest() { return 0; }
  HWY_INLINE void rest_values(D, std::int64_t, Vector<D>&, Vector<D>&) const {}
};

/// int8. The group is a multiple of a step.
template <class D>
struct Int8 : Grouped<D> {
  static constexpr bool kScaled = true, kNumbers = false;
  static constexpr std::int64_t kStepBytes = 2 * kLanes<D>;
  const std::int8_t* q;
  const std::uint16_t* scales;

  struct Group {
    const std::int8_t* p;
    Vector<D> scale;
    HWY_INLINE static Vector<D> floats(D d, const std::int8_t* p) {
      const hn::RebindToSigned<D> words;
      return hn::ConvertTo(d, hn::PromoteTo(words, hn::LoadU(hn::Rebind<std::int8_t, D>(), p)));
    }
    HWY_INLINE void raw(D d, std::int64_t step, Vector<D>& a, Vector<D>& b) const {
      a = floats(d, p + 2 * kLanes<D> * step);
      b = floats(d, p + 2 * kLanes<D> * step + kLanes<D>);
    }
    HWY_INLINE void values(D d, std::int64_t step, Vector<D>& a, Vector<D>& b) const {
      raw(d, step, a, b);
      a = hn::Mul(a, scale);
      b = hn::Mul(b, scale);
    }
  };

  HWY_INLINE const void* bytes(std::int64_t row) const { return q + row * this->K; }
  HWY_INLINE const Int8& part(std::int64_t, std::int64_t) const { return *this; }
  HWY_INLINE std::int64_t steps() const { return this->group_size / (2 * kLanes<D>); }
  HWY_INLINE std::int64_t at(std::int64_t g, std::int64_t step) const {
    return g * this->group_size + 2 * kLanes<D> * step;
  }
  HWY_INLINE std::int64_t apart() const { return kLanes<D>; }
  template <bool kRaw>
  HWY_INLINE Group group(std::int64_t row, std::int64_t g) const {
    return {q + row * this->K + g * this->group_size, hn::Set(D(), float_of(scales[row * this->groups() + g]))};
  }
};

/// 4 bits. Where a vector of AVX-512 holds 16 values, what q can mean in a group is one vector, in which q looks it up:
/// one instruction in place of three.
template <class D, bool kTable = (HWY_TARGET <= HWY_AVX3 && kLanes<D> == 16)>
struct Int4 : Grouped<D> {
  static constexpr bool kScaled = true, kNumbers = false;
  static constexpr std::int64_t kStepBytes = kLanes<D>;
  const std::uint8_t* q;
  const std::uint16_t* scales;
  const std::uint8_t* zeros;
  using Words = hn::RebindToSigned<D>;

  struct Group {
    const std::uint8_t* p;
    Vector<D> scale;
    Vector<Words> zero;
    Vector<D> table;  // of each q: q - zero, or the weight

    /// table[index modulo 16]
    HWY_INLINE static Vector<D> looked_up(Vector<D> table, Vector<Words> index) {
#if HWY_TARGET <= HWY_AVX3
      // Highway's TableLookupLanes wants what is above 16 cleared, which vpermps itself ignores.
      if constexpr (kTable) return Vector<D>{_mm512_permutexvar_ps(index.raw, table.raw)};
#endif
      (void)index;
      return table;
    }

    HWY_INLINE void raw(D d, std::int64_t step, Vector<D>& a, Vector<D>& b) const {
      const auto bytes = hn::PromoteTo(Words(), hn::LoadU(hn::Rebind<std::uint8_t, D>(), p + kLanes<D> * step));
      if constexpr (kTable) {
        a = looked_up(table, bytes);
        b = looked_up(table, hn::ShiftRight<4>(bytes));
      } else {
        a = hn::ConvertTo(d, hn::Sub(hn::And(bytes, hn::Set(Words(), 15)), zero));
        b = hn::ConvertTo(d, hn::Sub(hn::ShiftRight<4>(bytes), zero));
      }
    }
    HWY_INLINE void values(D d, std::int64_t step, Vector<D>& a, Vector<D>& b) const {
      raw(d, step, a, b);
      if constexpr (kTable) return;  // of weights
      a = hn::Mul(a, scale);
      b = hn::Mul(b, scale);
    }
  };

  HWY_INLINE const void* bytes(std::int64_t row) const { return q + row * (this->K / 2); }
  HWY_INLINE const Int4& part(std::int64_t, std::int64_t) const { return *this; }
  HWY_INLINE std::int64_t steps() const { return this->group_size / (2 * kLanes<D>); }
  HWY_INLINE std::int64_t at(std::int64_t g, std::int64_t step) const {
    return g * this->group_size + kLanes<D> * step;
  }
  HWY_INLINE std::int64_t apart() const { return this->group_size / 2; }
  template <bool kRaw>
  HWY_INLINE Group group(std::int64_t row, std::int64_t g) const {
    const std::int64_t i = row * this->groups() + g;
    const auto zero = hn::Set(Words(), std::int32_t{zeros[i]});
    const auto scale = hn::Set(D(), float_of(scales[i]));
    auto table = hn::Zero(D());
    if constexpr (kTable) table = hn::ConvertTo(D(), hn::Sub(hn::Iota(Words(), 0), zero));
    if constexpr (kTable && !kRaw) table = hn::Mul(table, scale);
    return {q + (row * this->K + g * this->group_size) / 2, scale, zero, table};
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace nanochat_x::kernels
HWY_AFTER_NAMESPACE();
#endif
