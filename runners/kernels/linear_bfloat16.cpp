// bfloat16 with bfloat16, by the instruction that multiplies and adds pairs of them. Highway does not offer it for all
// processors that have it, so it is called by name; machines without it never come here.
#include <algorithm>

#include "activations.h"
#include "avx512.h"
#include "blocks.h"
#include "checks.h"
#include "kernels.h"

#ifdef NANOCHAT_X_AVX512
#define NANOCHAT_X_BF16 __attribute__((target(NANOCHAT_X_AVX512 ",avx512bf16")))
#endif

namespace nanochat_x::kernels {

#ifdef NANOCHAT_X_BF16
namespace {

constexpr std::int64_t kLanes = 32;

// Lanes past the row's end are zero.
NANOCHAT_X_BF16 inline __m512bh load(const std::uint16_t* p, std::int64_t count) {
  const __mmask32 mask = count >= kLanes ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
  return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, p));
}

NANOCHAT_X_BF16 inline __m512bh load(const std::uint16_t* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}

// Of two vectors the sums of their blocks of four lanes, two and two.
NANOCHAT_X_BF16 inline __m512 halved(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

// The sum of the lanes of each of 16 vectors. (What is only a copy is left out by the compiler.)
NANOCHAT_X_BF16 inline __m512 sums_of_lanes(const __m512 (&v)[16]) {
  __m512 fours[4], eights[2];
  for (int i = 0; i < 4; ++i) fours[i] = sums_of_blocks(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  for (int i = 0; i < 2; ++i) eights[i] = halved(fours[2 * i], fours[2 * i + 1]);
  return halved(eights[0], eights[1]);
}

// Columns [0, depth) of x and w, whose rows are K values apart.
struct Part {
  const std::uint16_t* x;
  const std::uint16_t* w;
  std::int64_t depth, K;
};

// y[m, row + r] for R rows of w and M of x. One row of x has two sums, so that additions need not wait for one another.
template <int R, int M>
NANOCHAT_X_BF16 void tile(const Part& part, const Output& to, std::int64_t row, Ahead& ahead) {
  constexpr int kSums = M == 1 ? 2 : 1;
  __m512 sums[R][M][kSums];
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      for (int i = 0; i < kSums; ++i) sums[r][m][i] = _mm512_setzero_ps();
    }
  }
  const std::int64_t K = part.K;
  const std::uint16_t* const x = part.x;
  const std::uint16_t* const rows = part.w + row * K;
  std::int64_t k = 0;
  for (; k + kSums * kLanes <= part.depth; k += kSums * kLanes) {
    if constexpr (R > 1) ahead.fetch<2>();
    if constexpr (R == 1 && M == 1) ahead.fetch<1>();
    for (int i = 0; i < kSums; ++i) {
      const std::int64_t at = k + i * kLanes;
      __m512bh weights[R];
      for (int r = 0; r < R; ++r) weights[r] = load(rows + r * K + at);
      for (int m = 0; m < M; ++m) {
        const __m512bh of_x = load(x + m * K + at);
        for (int r = 0; r < R; ++r) sums[r][m][i] = _mm512_dpbf16_ps(sums[r][m][i], weights[r], of_x);
      }
    }
  }
  for (; k < part.depth; k += kLanes) {
    const std::int64_t rest = part.depth - k;
    for (int m = 0; m < M; ++m) {
      const __m512bh of_x = load(x + m * K + k, rest);
      for (int r = 0; r < R; ++r) sums[r][m][0] = _mm512_dpbf16_ps(sums[r][m][0], load(rows + r * K + k, rest), of_x);
    }
  }
  __m512 all[16];
  for (int i = 0; i < 16; ++i) {
    const __m512* sum = sums[i % (R * M) / M][i % M];
    all[i] = kSums == 2 ? _mm512_add_ps(sum[0], sum[kSums - 1]) : sum[0];
  }
  alignas(64) float results[16];
  _mm512_store_ps(results, sums_of_lanes(all));
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < R; ++r) {
      float& y = to.y[m * to.stride + row + r];
      y = to.adds ? y + results[r * M + m] : results[r * M + m];
    }
  }
}

template <int R, int M>
NANOCHAT_X_BF16 void tiles(const Part& part, const Output& to, std::int64_t begin, std::int64_t end, Ahead& ahead) {
  for (; begin + R <= end; begin += R) tile<R, M>(part, to, begin, ahead);
  for (; begin < end; ++begin) tile<1, M>(part, to, begin, ahead);
}

// All of to.M rows of x, four at a time.
void product_of_part(const Part& whole, Output to, std::int64_t begin, std::int64_t end, Ahead& ahead) {
  Part part = whole;
  const auto next = [&](int rows) {
    part.x += rows * part.K;
    to.y += rows * to.stride;
    to.M -= rows;
  };
  for (; to.M >= 4; next(4)) tiles<4, 4>(part, to, begin, end, ahead);
  for (; to.M >= 2; next(2)) tiles<4, 2>(part, to, begin, end, ahead);
  if (to.M == 1) tiles<4, 1>(part, to, begin, end, ahead);
}

}  // namespace

bool multiplies_bfloat16() {
  static const bool can = has_avx512() && __builtin_cpu_supports("avx512bf16") != 0;
  return can;
}

bool multiplies_bfloat16_faster() { return multiplies_bfloat16() && __builtin_cpu_is("intel") == 0; }

void linear_bfloat16(const std::uint16_t* x, std::int64_t M, std::int64_t K, const std::uint16_t* w, float* y,
                     std::int64_t y_stride, std::int64_t begin, std::int64_t end) {
  check_batch(M);
  check_width(K);
  check_rows(begin, end);
  if (!multiplies_bfloat16()) throw Error("this processor does not multiply bfloat16");
  if (M == 1) {
    // Nothing is gained by rows side by side: w is read as it lies.
    const std::int64_t steps = std::max<std::int64_t>(1, K / (2 * kLanes)), bytes = K * 2;
    const char* const from = reinterpret_cast<const char*>(w);
    Ahead ahead(from + begin * bytes + kBytesAhead, from + end * bytes + kBytesAhead, (bytes + steps - 1) / steps);
    return tiles<1, 1>({x, w, K, K}, {y, y_stride, 1, false}, begin, end, ahead);
  }
  constexpr std::int64_t kDepth = kBytesOfPart / static_cast<std::int64_t>(sizeof(std::uint16_t));
  in_blocks(begin, end, [&](std::int64_t from, std::int64_t stop, std::int64_t next) {
    Ahead ahead(w + stop * K, w + next * K, 4 * kLanes * 2 / ((M + 3) / 4));
    for (std::int64_t k = 0; k < K; k += kDepth) {
      product_of_part({x + k, w + k, std::min(kDepth, K - k), K}, {y, y_stride, M, k > 0}, from, stop, ahead);
    }
  });
}

#else

bool multiplies_bfloat16() { return false; }

bool multiplies_bfloat16_faster() { return false; }

void linear_bfloat16(const std::uint16_t*, std::int64_t, std::int64_t, const std::uint16_t*, float*, std::int64_t,
                     std::int64_t, std::int64_t) {
  throw Error("this processor does not multiply bfloat16");
}

#endif

}  // namespace nanochat_x::kernels
