// bfloat16 with bfloat16, by the instruction that multiplies and adds pairs of them. Highway does not offer it for all
// processors that have it, so it is called by name; machines without it never come here.
#include <algorithm>

#include "checks.h"
#include "kernels.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
// (gcc 12 takes a value that its own header leaves undefined on purpose for a mistake)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#define NANOCHAT_X_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
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

// y[m, row + r] for R rows of w and M of x. Two sums each, so that additions need not wait for one another; for more
// products at once one is enough.
template <int R, int M>
NANOCHAT_X_BF16 void tile(const std::uint16_t* x, std::int64_t K, const std::uint16_t* w, float* y,
                          std::int64_t y_stride, std::int64_t row) {
  constexpr int kSums = M == 1 ? 2 : 1;
  __m512 sums[R][M][kSums];
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      for (int i = 0; i < kSums; ++i) sums[r][m][i] = _mm512_setzero_ps();
    }
  }
  const std::uint16_t* rows = w + row * K;
  std::int64_t k = 0;
  for (; k + kSums * kLanes <= K; k += kSums * kLanes) {
    for (int i = 0; i < kSums; ++i) {
      const std::int64_t at = k + i * kLanes;
      __m512bh weights[R];
      for (int r = 0; r < R; ++r) {
        _mm_prefetch(rows + (r + R) * K + at, _MM_HINT_T0);
        weights[r] = load(rows + r * K + at);
      }
      for (int m = 0; m < M; ++m) {
        const __m512bh of_x = load(x + m * K + at);
        for (int r = 0; r < R; ++r) sums[r][m][i] = _mm512_dpbf16_ps(sums[r][m][i], weights[r], of_x);
      }
    }
  }
  for (; k < K; k += kLanes) {
    for (int m = 0; m < M; ++m) {
      const __m512bh of_x = load(x + m * K + k, K - k);
      for (int r = 0; r < R; ++r) sums[r][m][0] = _mm512_dpbf16_ps(sums[r][m][0], load(rows + r * K + k, K - k), of_x);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < R; ++r) {
      __m512 sum = sums[r][m][0];
      if constexpr (kSums == 2) sum = _mm512_add_ps(sum, sums[r][m][1]);
      y[m * y_stride + row + r] = _mm512_reduce_add_ps(sum);
    }
  }
}

template <int R, int M>
NANOCHAT_X_BF16 void tiles(const std::uint16_t* x, std::int64_t K, const std::uint16_t* w, float* y,
                           std::int64_t y_stride, std::int64_t begin, std::int64_t end) {
  for (; begin + R <= end; begin += R) tile<R, M>(x, K, w, y, y_stride, begin);
  for (; begin < end; ++begin) tile<1, M>(x, K, w, y, y_stride, begin);
}

}  // namespace

bool multiplies_bfloat16() {
  static const bool can = __builtin_cpu_supports("avx512bf16") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
                          __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0;
  return can;
}

void linear_bfloat16(const std::uint16_t* x, std::int64_t M, std::int64_t K, const std::uint16_t* w, float* y,
                     std::int64_t y_stride, std::int64_t begin, std::int64_t end) {
  check_batch(M);
  check_width(K);
  check_rows(begin, end);
  if (!multiplies_bfloat16()) throw Error("this processor does not multiply bfloat16");
  constexpr std::int64_t kRows = 24;  // of w, which stay in the cache until all of x is done; a multiple of each R
  for (; begin < end; begin += kRows) {
    const std::int64_t stop = std::min(end, begin + kRows);
    std::int64_t m = 0;
    for (; m + 8 <= M; m += 8) tiles<3, 8>(x + m * K, K, w, y + m * y_stride, y_stride, begin, stop);
    for (; m + 4 <= M; m += 4) tiles<4, 4>(x + m * K, K, w, y + m * y_stride, y_stride, begin, stop);
    for (; m + 2 <= M; m += 2) tiles<4, 2>(x + m * K, K, w, y + m * y_stride, y_stride, begin, stop);
    for (; m < M; ++m) tiles<4, 1>(x + m * K, K, w, y + m * y_stride, y_stride, begin, stop);
  }
}

#else

bool multiplies_bfloat16() { return false; }

void linear_bfloat16(const std::uint16_t*, std::int64_t, std::int64_t, const std::uint16_t*, float*, std::int64_t,
                     std::int64_t, std::int64_t) {
  throw Error("this processor does not multiply bfloat16");
}

#endif

}  // namespace nanochat_x::kernels
