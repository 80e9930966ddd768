// Many rows of x in integers with int8 and int4, by the instruction that multiplies unsigned bytes with signed ones and
// adds four products. An integer of x, raised by 2^15, is two unsigned bytes; what that adds to a sum is taken off
// again before it begins, exactly. Vectors hold four columns of 16 rows of x each, so that four columns of a row of w
// are one number for all lanes, and weights need not be turned. Machines without the instruction never come here.
#include <algorithm>
#include <cstring>

#include "avx512.h"
#include "bfloat16.h"
#include "checks.h"
#include "integers.h"
#include "thread_space.h"

namespace nanochat_x::kernels {

#ifdef NANOCHAT_X_VNNI
namespace {

constexpr std::int64_t kLanes = 16;   // rows of x in a vector
constexpr std::int64_t kFour = 4;     // columns that one instruction adds up
constexpr std::int64_t kDepth = 256;  // columns at a time: 32 rows of x and 48 of w, 28 KiB, stay in the first cache
constexpr std::int64_t kRows = 48;    // of w at a time
constexpr int kTileRows = 4;          // of w in registers
static_assert(kPanelRows % kRows == 0 && kRows % kTileRows == 0);

// Some columns of kRows rows of w in bytes: a whole number of groups, one row behind the other. lifts: what a sum of a
// group's products begins with.
struct Part {
  std::int8_t* w;
  std::int32_t* lifts;
  float* scales;
  std::int64_t groups, group;
};

// 16 rows of x: for four columns 16 times their high bytes, then their low ones; and of each group the 16 scales.
struct Tile {
  const QuantizedRow::Line* x;
  const QuantizedRows::Scales* scales;
};

// Adds to y [kTileRows, V * 16], rows of w by rows of x, which begin at `w`, `lifts` and `scales` of the part's.
template <int V>
NANOCHAT_X_VNNI inline void tile(const Tile (&tiles)[V], const Part& part, std::int64_t row, float* y) {
  const std::int64_t depth = part.groups * part.group;
  const std::int8_t* const w = part.w + row * depth;
  __m512 sums[kTileRows][V];
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = _mm512_loadu_ps(y + (r * V + v) * kLanes);
  }
  for (std::int64_t g = 0; g < part.groups; ++g) {
    __m512i high[kTileRows][V], low[kTileRows][V];
    for (int r = 0; r < kTileRows; ++r) {
      const __m512i lift = _mm512_set1_epi32(part.lifts[(row + r) * part.groups + g]);
      for (int v = 0; v < V; ++v) {
        high[r][v] = _mm512_setzero_si512();
        low[r][v] = lift;
      }
    }
    for (std::int64_t k = g * part.group; k < (g + 1) * part.group; k += kFour) {
      __m512i of_x[V][2];
      for (int v = 0; v < V; ++v) {
        of_x[v][0] = _mm512_load_si512(tiles[v].x[k / 2].bytes);
        of_x[v][1] = _mm512_load_si512(tiles[v].x[k / 2 + 1].bytes);
      }
      for (int r = 0; r < kTileRows; ++r) {
        std::int32_t four;
        std::memcpy(&four, w + r * depth + k, sizeof four);
        const __m512i weights = _mm512_set1_epi32(four);
        for (int v = 0; v < V; ++v) {
          high[r][v] = _mm512_dpbusd_epi32(high[r][v], of_x[v][0], weights);
          low[r][v] = _mm512_dpbusd_epi32(low[r][v], of_x[v][1], weights);
        }
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      const __m512 scale = _mm512_set1_ps(part.scales[(row + r) * part.groups + g]);
      for (int v = 0; v < V; ++v) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[r][v], 8), low[r][v]));
        const __m512 both = _mm512_mul_ps(_mm512_load_ps(tiles[v].scales[g].of_row), scale);
        sums[r][v] = _mm512_fmadd_ps(sum, both, sums[r][v]);
      }
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(y + (r * V + v) * kLanes, sums[r][v]);
  }
}

// What a sum must begin with so that 2^15 times these weights, which x is raised by, is not part of it. (Sums may wrap
// around on their way; none ends beyond int32.)
NANOCHAT_X_VNNI inline std::int32_t lift_of(__m512i sums_of_weights) {
  return static_cast<std::int32_t>(0U - (static_cast<std::uint32_t>(_mm512_reduce_add_epi32(sums_of_weights)) << 15));
}

NANOCHAT_X_VNNI std::int32_t group_of_int8(const std::uint8_t* from, std::int64_t group, std::int8_t* to) {
  constexpr std::int64_t kBytes = 64;
  __m512i sums = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < group; i += kBytes) {
    const __mmask64 mask = group - i >= kBytes ? ~__mmask64{0} : (__mmask64{1} << (group - i)) - 1;
    const __m512i values = _mm512_maskz_loadu_epi8(mask, from + i);
    _mm512_mask_storeu_epi8(to + i, mask, values);
    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), values);
  }
  return lift_of(sums);
}

NANOCHAT_X_VNNI std::int32_t group_of_int4(const std::uint8_t* from, std::int64_t group, std::uint8_t zero,
                                           std::int8_t* to) {
  constexpr std::int64_t kBytes = 32;
  const std::int64_t half = group / 2;
  const __m256i fifteen = _mm256_set1_epi8(15), zeros = _mm256_set1_epi8(static_cast<char>(zero));
  __m512i sums = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < half; i += kBytes) {
    const __mmask32 mask = half - i >= kBytes ? ~__mmask32{0} : (__mmask32{1} << (half - i)) - 1;
    const __m256i bytes = _mm256_maskz_loadu_epi8(mask, from + i);
    const auto store = [&](__m256i halves, std::int8_t* at) NANOCHAT_X_VNNI {
      const __m256i values = _mm256_maskz_sub_epi8(mask, halves, zeros);
      _mm256_mask_storeu_epi8(at, mask, values);
      sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_zextsi256_si512(values));
    };
    store(_mm256_and_si256(bytes, fifteen), to + i);
    store(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), fifteen), to + i + half);
  }
  return lift_of(sums);
}

// Some rows of w, as the tiles want them: the parts one behind the other.
class Panel {
 public:
  Panel(std::int64_t K, std::int64_t group, int bits)
      : K_(K),
        group_(group),
        bits_(bits),
        groups_of_part_(std::max<std::int64_t>(1, kDepth / group)),
        w_(thread_space<std::int8_t, Space::weights>(kRows * K)),
        lifts_(thread_space<std::int32_t, Space::weights>(kRows * (K / group))),
        scales_(thread_space<float, Space::weights>(kRows * (K / group))) {}

  // Rows [begin, begin + rows) of w, those up to kRows nothing.
  void fill(const QuantizedWeights& w, std::int64_t begin, std::int64_t rows) {
    const std::int64_t all = K_ / group_, bytes = group_ * bits_ / 8;
    for (std::int64_t first = 0; first < all; first += groups_of_part_) {
      const Part to = part(first);
      for (std::int64_t row = 0; row < kRows; ++row) {
        for (std::int64_t g = 0; g < to.groups; ++g) {
          std::int8_t* const values = to.w + (row * to.groups + g) * group_;
          const std::int64_t i = (begin + row) * all + first + g;
          std::int32_t lift = 0;
          if (row >= rows) {
            std::fill_n(values, group_, std::int8_t{0});
          } else {
            lift = bits_ == 8 ? group_of_int8(w.q + i * bytes, group_, values)
                              : group_of_int4(w.q + i * bytes, group_, w.zeros[i], values);
          }
          to.lifts[row * to.groups + g] = lift;
          to.scales[row * to.groups + g] = row < rows ? float_of(w.scales[i]) : 0.0F;
        }
      }
    }
  }

  // From the group `first` on.
  Part part(std::int64_t first) const {
    const std::int64_t groups = std::min(groups_of_part_, K_ / group_ - first);
    return {w_ + first * group_ * kRows, lifts_ + first * kRows, scales_ + first * kRows, groups, group_};
  }

  std::int64_t groups_of_part() const { return groups_of_part_; }

 private:
  std::int64_t K_, group_;
  int bits_;
  std::int64_t groups_of_part_;
  std::int8_t* w_;
  std::int32_t* lifts_;
  float* scales_;
};

// Four rows of `from`, `stride` apart, of 16 columns: to[m * to_stride + r], of the first M columns.
NANOCHAT_X_VNNI inline void store_turned(const float* from, std::int64_t stride, std::int64_t M, float* to,
                                         std::int64_t to_stride) {
  const __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + stride), c = _mm512_loadu_ps(from + 2 * stride),
               d = _mm512_loadu_ps(from + 3 * stride);
  const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d)),
                ab2 = _mm512_castps_pd(_mm512_unpackhi_ps(a, b)), cd2 = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
  // Of four columns in turn, those in each block of four lanes.
  alignas(64) double turned[4][8];
  _mm512_store_pd(turned[0], _mm512_unpacklo_pd(ab, cd));
  _mm512_store_pd(turned[1], _mm512_unpackhi_pd(ab, cd));
  _mm512_store_pd(turned[2], _mm512_unpacklo_pd(ab2, cd2));
  _mm512_store_pd(turned[3], _mm512_unpackhi_pd(ab2, cd2));
  for (std::int64_t m = 0; m < M; ++m) std::memcpy(to + m * to_stride, turned[m % 4] + m / 4 * 2, 4 * sizeof(float));
}

// The products of V tiles of x with the panel: y[m * y_stride + row], for M of the tiles' rows and `rows` of w.
template <int V>
NANOCHAT_X_VNNI void products(const QuantizedRows& x, std::int64_t first_tile, const Panel& panel, std::int64_t rows,
                              float* y, std::int64_t y_stride) {
  const std::int64_t groups = x.columns() / x.group(), M = std::min(V * kLanes, x.rows() - first_tile * kLanes);
  const std::int64_t all = (rows + kTileRows - 1) / kTileRows * kTileRows;
  float* const sums = thread_space<float, Space::work>(kRows * V * kLanes);
  std::fill_n(sums, all * V * kLanes, 0.0F);
  for (std::int64_t first = 0; first < groups; first += panel.groups_of_part()) {
    const Part part = panel.part(first);
    Tile tiles[V];
    for (int v = 0; v < V; ++v) {
      tiles[v] = {x.lines(first_tile + v) + first * x.group() / 2, x.scales(first_tile + v) + first};
    }
    for (std::int64_t row = 0; row < all; row += kTileRows) tile<V>(tiles, part, row, sums + row * V * kLanes);
  }
  for (int v = 0; v < V; ++v) {
    const std::int64_t count = std::clamp<std::int64_t>(M - v * kLanes, 0, kLanes);
    const float* const from = sums + v * kLanes;
    float* const to = y + v * kLanes * y_stride;
    std::int64_t row = 0;
    for (; row + 4 <= rows; row += 4) store_turned(from + row * V * kLanes, V * kLanes, count, to + row, y_stride);
    for (; row < rows; ++row) {
      for (std::int64_t m = 0; m < count; ++m) to[m * y_stride + row] = from[row * V * kLanes + m];
    }
  }
}

void product(const QuantizedRows& x, int bits, const QuantizedWeights& w, float* y, std::int64_t y_stride,
             std::int64_t begin, std::int64_t end) {
  Panel panel(x.columns(), x.group(), bits);
  const std::int64_t tiles = (x.rows() + kLanes - 1) / kLanes;
  for (; begin < end; begin += kRows) {
    const std::int64_t rows = std::min(kRows, end - begin);
    panel.fill(w, begin, rows);
    std::int64_t t = 0;
    const auto to = [&] { return y + t * kLanes * y_stride + begin; };
    for (; t + 2 <= tiles; t += 2) products<2>(x, t, panel, rows, to(), y_stride);
    if (t < tiles) products<1>(x, t, panel, rows, to(), y_stride);
  }
}

// The integers of one row, into its lane of a tile. Where there is no row, nothing.
NANOCHAT_X_VNNI void to_lane(const std::int16_t* q, std::int64_t K, QuantizedRow::Line* tile, std::int64_t lane) {
  constexpr std::int64_t kValues = 32;
  const std::int64_t at = lane * kFour;
  for (std::int64_t k = 0; k < K; k += kValues) {
    const std::int64_t count = std::min(kValues, K - k);
    const __mmask32 mask = count == kValues ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
    const __m512i raised =
        _mm512_xor_si512(_mm512_maskz_loadu_epi16(mask, q + k), _mm512_set1_epi16(static_cast<short>(0x8000)));
    alignas(32) std::int8_t high[kValues], low[kValues];
    _mm256_store_si256(reinterpret_cast<__m256i*>(high), _mm512_cvtepi16_epi8(_mm512_srli_epi16(raised, 8)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(low), _mm512_cvtepi16_epi8(raised));
    for (std::int64_t i = 0; i < count; i += kFour) {
      std::memcpy(tile[(k + i) / 2].bytes + at, high + i, kFour);
      std::memcpy(tile[(k + i) / 2 + 1].bytes + at, low + i, kFour);
    }
  }
}

}  // namespace

bool QuantizedRows::takes(std::int64_t group) { return has_vnni() && group <= kLargestGroup; }

QuantizedRows::QuantizedRows(std::int64_t M, std::int64_t K, std::int64_t group) : M_(M), K_(K), group_(group) {
  if (M < 1) throw Error("a product takes 1 row or more; got " + std::to_string(M));
  check_width(K);
  check_group(K, group);
  if (!takes(group)) throw Error("no product of many rows in integers takes groups of " + std::to_string(group));
  static_assert(kTogether == kLanes);
  const std::int64_t tiles = (M + kLanes - 1) / kLanes;
  lines_ = std::make_unique_for_overwrite<QuantizedRow::Line[]>(static_cast<std::size_t>(tiles * K / 2));
  scales_ = std::make_unique_for_overwrite<Scales[]>(static_cast<std::size_t>(tiles * (K / group)));
}

bool QuantizedRows::quantize(const float* x, std::int64_t begin, std::int64_t end) {
  check_rows(begin, end);
  if (begin % kLanes != 0 || end > M_ || (end % kLanes != 0 && end != M_)) {
    throw Error("rows of x: from " + std::to_string(begin) + " to " + std::to_string(end) + " of " +
                std::to_string(M_) + " are no whole tiles");
  }
  const std::int64_t groups = K_ / group_;
  auto* const q = thread_space<std::int16_t, Space::work>(K_);
  float* const scales = thread_space<float, Space::work>(2 * groups);
  for (std::int64_t m = begin; m < (end + kLanes - 1) / kLanes * kLanes; ++m) {
    if (m >= M_) {
      std::fill_n(q, K_, std::int16_t{0});
      std::fill_n(scales, groups, 0.0F);
    } else if (!integers_of(x + m * K_, K_, group_, q, scales, scales + groups)) {
      return false;
    }
    to_lane(q, K_, lines_.get() + m / kLanes * (K_ / 2), m % kLanes);
    for (std::int64_t g = 0; g < groups; ++g) scales_[m / kLanes * groups + g].of_row[m % kLanes] = scales[g];
  }
  return true;
}

void matmul_int8(const QuantizedRows& x, const std::int8_t* q, const std::uint16_t* scales, float* y,
                 std::int64_t y_stride, std::int64_t begin, std::int64_t end) {
  check_rows(begin, end);
  product(x, 8, {reinterpret_cast<const std::uint8_t*>(q), scales, nullptr}, y, y_stride, begin, end);
}

void matmul_int4(const QuantizedRows& x, const std::uint8_t* q, const std::uint16_t* scales, const std::uint8_t* zeros,
                 float* y, std::int64_t y_stride, std::int64_t begin, std::int64_t end) {
  check_rows(begin, end);
  product(x, 4, {q, scales, zeros}, y, y_stride, begin, end);
}

#else

bool QuantizedRows::takes(std::int64_t) { return false; }

QuantizedRows::QuantizedRows(std::int64_t M, std::int64_t K, std::int64_t group) : M_(M), K_(K), group_(group) {
  throw Error("this processor has no product of bytes");
}

bool QuantizedRows::quantize(const float*, std::int64_t, std::int64_t) { return false; }

void matmul_int8(const QuantizedRows&, const std::int8_t*, const std::uint16_t*, float*, std::int64_t, std::int64_t,
                 std::int64_t) {
  throw Error("this processor has no product of bytes");
}

void matmul_int4(const QuantizedRows&, const std::uint8_t*, const std::uint16_t*, const std::uint8_t*, float*,
                 std::int64_t, std::int64_t, std::int64_t) {
  throw Error("this processor has no product of bytes");
}

#endif

}  // namespace nanochat_x::kernels
