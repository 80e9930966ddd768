// One row of x in integers with weights of int8 and int4 as they lie, by the instruction that multiplies unsigned bytes
// with signed ones and adds four products: each integer of x is 256 times its high byte and its low byte, both signed.
// Highway does not offer the instruction for all processors that have it, so it is called by name; machines without it
// never come here.
//
// A chunk is 64 bytes of a row of w, and of x the lines
//   int8: [high bytes] [low bytes] [int32: -128 times the sums of four integers], the weights being raised by 128;
//   int4: [high, low bytes of what meets the lower halves of w's bytes] [those of what meets the upper halves].
#include <algorithm>
#include <bit>
#include <cstring>

#include "avx512.h"
#include "blocks.h"
#include "integers.h"

namespace nanochat_x::kernels {

#ifdef NANOCHAT_X_VNNI
namespace {

constexpr std::int64_t kChunk = 64;   // bytes of w
constexpr std::int64_t kScales = 16;  // of a vector
constexpr std::int64_t kLinesOfInt8 = 3, kLinesOfInt4 = 4;

constexpr std::int64_t lines_of_chunk(int bits) { return bits == 8 ? kLinesOfInt8 : kLinesOfInt4; }

// The integers from q on into bytes, from those on.
void split(const std::int16_t* q, std::int64_t count, std::int8_t* high, std::int8_t* low) {
  for (std::int64_t i = 0; i < count; ++i) {
    low[i] = static_cast<std::int8_t>(q[i]);
    high[i] = static_cast<std::int8_t>((q[i] + 128) >> 8);
  }
}

std::vector<QuantizedRow::Line> lines_for_int8(const std::int16_t* q, std::int64_t K) {
  std::vector<QuantizedRow::Line> lines(static_cast<std::size_t>((K + kChunk - 1) / kChunk * kLinesOfInt8));
  auto* to = lines.data();
  for (; K > 0; K -= kChunk, q += kChunk, to += kLinesOfInt8) {
    const std::int64_t count = std::min(K, kChunk);
    split(q, count, to[0].bytes, to[1].bytes);
    std::int32_t raised[kScales] = {};
    for (std::int64_t i = 0; i < count; ++i) raised[i / 4] -= 128 * q[i];
    std::memcpy(to[2].bytes, raised, sizeof raised);
  }
  return lines;
}

std::vector<QuantizedRow::Line> lines_for_int4(const std::int16_t* q, std::int64_t K, std::int64_t group) {
  const std::int64_t half = group / 2, step = std::min(half, kChunk);
  std::vector<QuantizedRow::Line> lines(static_cast<std::size_t>((K / 2 + kChunk - 1) / kChunk * kLinesOfInt4));
  for (std::int64_t byte = 0; byte < K / 2; byte += step) {  // of w
    auto* const to = lines.data() + byte / kChunk * kLinesOfInt4;
    const std::int64_t at = byte % kChunk, first = byte / half * group + byte % half;
    split(q + first, step, to[0].bytes + at, to[1].bytes + at);
    split(q + first + half, step, to[2].bytes + at, to[3].bytes + at);
  }
  return lines;
}

NANOCHAT_X_VNNI inline __m512i line(const QuantizedRow::Line& from) { return _mm512_load_si512(from.bytes); }

// The sums of four weights and integers each, of a chunk of int8 and of int4.
template <int kBits>
NANOCHAT_X_VNNI inline __m512i sums_of_four(__m512i w, const __m512i (&x)[lines_of_chunk(kBits)]) {
  __m512i high = _mm512_setzero_si512(), low = high;
  if constexpr (kBits == 8) {
    const __m512i raised = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
    high = _mm512_dpbusd_epi32(high, raised, x[0]);
    low = _mm512_dpbusd_epi32(x[2], raised, x[1]);
  } else {
    const __m512i half = _mm512_set1_epi8(15);
    const __m512i lower = _mm512_and_si512(w, half), upper = _mm512_and_si512(_mm512_srli_epi16(w, 4), half);
    high = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(high, lower, x[0]), upper, x[2]);
    low = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(low, lower, x[1]), upper, x[3]);
  }
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}

// Scales and zero points of 16 groups; those that `mask` leaves out are zero.
NANOCHAT_X_VNNI inline __m512 scales_of(const std::uint16_t* bfloat16, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bfloat16)), 16));
}

NANOCHAT_X_VNNI inline __m512 zeros_of(const std::uint8_t* zeros, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, zeros)));
}

// The sum of the lanes of each of four vectors.
NANOCHAT_X_VNNI inline __m128 sums_of_lanes(const __m512 (&v)[4]) {
  const __m512 all = sums_of_blocks(v[0], v[1], v[2], v[3]);
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

// y[0] to y[R - 1], of the R rows that w begins with.
template <int kBits, int R>
NANOCHAT_X_VNNI inline void tile(const QuantizedRow& x, const QuantizedWeights& w, float* y) {
  const std::int64_t groups = x.size() / x.group(), bytes_of_row = x.size() * kBits / 8;
  const std::int64_t bytes_of_group = x.group() * kBits / 8;
  const __m128i shift = _mm_cvtsi32_si128(std::countr_zero(static_cast<std::uint64_t>(bytes_of_group)));
  const __m512i fours = _mm512_set_epi32(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
  const std::uint8_t* const ahead = w.q + R * bytes_of_row + kBytesAhead;
  Ahead next(ahead, ahead + R * bytes_of_row, R * kChunk);
  const QuantizedRow::Line* of_x = x.lines();
  std::int64_t at = 0;  // bytes of a row that are done
  __m512 total[4], lifted[4];
  for (int r = 0; r < 4; ++r) total[r] = lifted[r] = _mm512_setzero_ps();
  for (std::int64_t first = 0; first < groups; first += kScales) {
    const auto some = static_cast<__mmask16>((1U << std::min(kScales, groups - first)) - 1);
    const __m512 scales_of_x = _mm512_maskz_loadu_ps(some, x.scales() + first);
    __m512 both[R];
    for (int r = 0; r < R; ++r) {
      const __m512 scales = scales_of(w.scales + r * groups + first, some);
      both[r] = _mm512_mul_ps(scales, scales_of_x);
      if constexpr (kBits == 4) {
        const __m512 sums = _mm512_maskz_loadu_ps(some, x.sums() + first);
        lifted[r] =
            _mm512_fmadd_ps(_mm512_mul_ps(scales, sums), zeros_of(w.zeros + r * groups + first, some), lifted[r]);
      }
    }
    // Which of the scales the lanes of a chunk have
    __m512i bytes = fours;
    const std::int64_t stop = std::min(bytes_of_row, at + kScales * bytes_of_group);
    for (; at < stop; at += kChunk, of_x += lines_of_chunk(kBits)) {
      next.fetch<1>();
      const __mmask64 there = stop - at >= kChunk ? ~__mmask64{0} : (__mmask64{1} << (stop - at)) - 1;
      const __m512i lanes = _mm512_srl_epi32(bytes, shift);
      bytes = _mm512_add_epi32(bytes, _mm512_set1_epi32(kChunk));
      __m512i lines[lines_of_chunk(kBits)];
      for (int i = 0; i < lines_of_chunk(kBits); ++i) lines[i] = line(of_x[i]);
      for (int r = 0; r < R; ++r) {
        const __m512i weights = _mm512_maskz_loadu_epi8(there, w.q + r * bytes_of_row + at);
        total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums_of_four<kBits>(weights, lines)),
                                   _mm512_permutexvar_ps(lanes, both[r]), total[r]);
      }
    }
  }
  for (int r = 0; r < R; ++r) total[r] = _mm512_sub_ps(total[r], lifted[r]);
  _mm_mask_storeu_ps(y, static_cast<__mmask8>((1U << R) - 1), sums_of_lanes(total));
}

template <int kBits>
NANOCHAT_X_VNNI void rows(const QuantizedRow& x, const QuantizedWeights& w, float* y, std::int64_t begin,
                          std::int64_t end) {
  const std::int64_t groups = x.size() / x.group(), bytes = x.size() * kBits / 8;
  const auto from = [&](std::int64_t row) {
    return QuantizedWeights{w.q + row * bytes, w.scales + row * groups, kBits == 4 ? w.zeros + row * groups : nullptr};
  };
  for (; begin + 4 <= end; begin += 4) tile<kBits, 4>(x, from(begin), y + begin);
  for (; begin < end; ++begin) tile<kBits, 1>(x, from(begin), y + begin);
}

}  // namespace

bool takes_bytes(std::int64_t group) {
  return has_vnni() && group >= 16 && std::has_single_bit(static_cast<std::uint64_t>(group));
}

std::vector<QuantizedRow::Line> lines_of(const std::int16_t* q, std::int64_t K, std::int64_t group, int bits) {
  return bits == 8 ? lines_for_int8(q, K) : lines_for_int4(q, K, group);
}

void product_of_bytes(const QuantizedRow& x, const QuantizedWeights& w, float* y, std::int64_t begin,
                      std::int64_t end) {
  x.bits() == 8 ? rows<8>(x, w, y, begin, end) : rows<4>(x, w, y, begin, end);
}

#else

bool takes_bytes(std::int64_t) { return false; }

std::vector<QuantizedRow::Line> lines_of(const std::int16_t*, std::int64_t, std::int64_t, int) { return {}; }

void product_of_bytes(const QuantizedRow&, const QuantizedWeights&, float*, std::int64_t, std::int64_t) {
  throw Error("this processor has no product of bytes");
}

#endif

}  // namespace nanochat_x::kernels
