// One row of x in integers, and which products there are of it.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "quantized_row.cpp"
#include "targets.h"
// (must come first)
#include <hwy/foreach_target.h>
// (and then)
#include <hwy/highway.h>

#include "checks.h"
#include "integers.h"

HWY_BEFORE_NAMESPACE();
namespace nanochat_x::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Both bytes of an integer are signed ones, the lower too: 127 * 256 + 127.
constexpr float kLargest = 32639;

/// x in integers, with a scale a group and what the integers' sum stands for. False if a value is NaN or infinite.
bool quantize(const float* x, std::int64_t K, std::int64_t group, std::int16_t* q, float* scales, float* sums) {
  const hn::CappedTag<float, 8> d;  // of which any group is a multiple
  const hn::RebindToSigned<decltype(d)> words;
  const hn::Rebind<std::int16_t, decltype(d)> halves;
  const auto N = static_cast<std::int64_t>(hn::Lanes(d));
  auto odd = hn::Zero(d);  // NaN from the first value on that is not finite
  for (std::int64_t g = 0; g < K / group; ++g, x += group, q += group) {
    auto largest = hn::Zero(d);
    for (std::int64_t i = 0; i < group; i += N) {
      const auto v = hn::LoadU(d, x + i);
      largest = hn::Max(largest, hn::Abs(v));
      odd = hn::MulAdd(v, hn::Zero(d), odd);
    }
    const float scale = hn::GetLane(hn::MaxOfLanes(d, largest)) / kLargest;
    // (of numbers so small that their scale is none, nothing is left)
    const auto inverse = hn::Set(d, scale > 0 ? 1 / scale : 0.0F), most = hn::Set(d, kLargest);
    auto sum = hn::Zero(words);
    for (std::int64_t i = 0; i < group; i += N) {
      const auto steps = hn::Mul(hn::LoadU(d, x + i), inverse);
      const auto nearest = hn::NearestInt(hn::Min(hn::Max(steps, hn::Neg(most)), most));
      sum = hn::Add(sum, nearest);
      hn::StoreU(hn::DemoteTo(halves, nearest), halves, q + i);
    }
    scales[g] = scale;
    sums[g] = scale * static_cast<float>(hn::GetLane(hn::SumOfLanes(words, sum)));
  }
  return hn::GetLane(hn::SumOfLanes(d, odd)) == 0;
}

}  // namespace HWY_NAMESPACE
}  // namespace nanochat_x::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace nanochat_x::kernels {

HWY_EXPORT(quantize);

namespace {

using Layout = QuantizedRow::Layout;

void product(const QuantizedRow& x, int bits, const QuantizedWeights& w, float* y, std::int64_t begin,
             std::int64_t end) {
  check_rows(begin, end);
  if (!x.finite()) throw Error("a row of x that is not finite has no product in integers");
  if (x.bits() != bits) {
    throw Error("a row of x for weights of " + std::to_string(x.bits()) + " bits does not fit those of " +
                std::to_string(bits));
  }
  x.layout() == Layout::bytes ? product_of_bytes(x, w, y, begin, end) : product_of_words(x, w, y, begin, end);
}

}  // namespace

bool integers_of(const float* x, std::int64_t K, std::int64_t group, std::int16_t* q, float* scales, float* sums) {
  return HWY_DYNAMIC_DISPATCH(quantize)(x, K, group, q, scales, sums);
}

bool QuantizedRow::takes(Layout layout, int bits, std::int64_t group) {
  if (group > kLargestGroup) return false;
  return layout == Layout::bytes ? takes_bytes(group) : takes_words(bits, group);
}

std::optional<Layout> QuantizedRow::best(int bits, std::int64_t group) {
  for (const Layout layout : {Layout::bytes, Layout::words}) {
    if (takes(layout, bits, group)) return layout;
  }
  return std::nullopt;
}

QuantizedRow::QuantizedRow(const float* x, std::int64_t K, std::int64_t group, int bits, Layout layout)
    : group_(group), bits_(bits), layout_(layout) {
  check_width(K);
  check_group(K, group);
  if (!takes(layout, bits, group)) throw Error("no product of integers takes groups of " + std::to_string(group));
  q_.resize(static_cast<std::size_t>(K));
  scales_.resize(static_cast<std::size_t>(K / group));
  sums_.resize(scales_.size());
  finite_ = integers_of(x, K, group, q_.data(), scales_.data(), sums_.data());
  if (finite_ && layout == Layout::bytes) lines_ = lines_of(q_.data(), K, group, bits);
}

void linear_int8(const QuantizedRow& x, const std::int8_t* q, const std::uint16_t* scales, float* y, std::int64_t begin,
                 std::int64_t end) {
  product(x, 8, {reinterpret_cast<const std::uint8_t*>(q), scales, nullptr}, y, begin, end);
}

void linear_int4(const QuantizedRow& x, const std::uint8_t* q, const std::uint16_t* scales, const std::uint8_t* zeros,
                 float* y, std::int64_t begin, std::int64_t end) {
  product(x, 4, {q, scales, zeros}, y, begin, end);
}

}  // namespace nanochat_x::kernels
#endif
