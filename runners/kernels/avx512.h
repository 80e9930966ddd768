#pragma once

/// For files that call AVX-512's instructions by name; NANOCHAT_X_AVX512, the target that they begin with, is defined
/// where there are any, and NANOCHAT_X_VNNI, of functions that multiply bytes.
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define NANOCHAT_X_AVX512 "avx512f,avx512bw,avx512vl,avx512dq"
#define NANOCHAT_X_VNNI __attribute__((target(NANOCHAT_X_AVX512 ",avx512vnni")))
// (gcc 12 takes a value that its own header leaves undefined on purpose for a mistake)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace nanochat_x::kernels {

/// Whether this processor has the instructions of NANOCHAT_X_AVX512.
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
         __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0;
}

/// Whether it has those of NANOCHAT_X_VNNI too.
inline bool has_vnni() {
  static const bool can = has_avx512() && __builtin_cpu_supports("avx512vnni") != 0;
  return can;
}

/// Lane i of each block of four lanes: the sum of that block of v_i.
__attribute__((target(NANOCHAT_X_AVX512))) inline __m512 sums_of_blocks(__m512 v0, __m512 v1, __m512 v2, __m512 v3) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v0, v1), _mm512_unpackhi_ps(v0, v1));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v2, v3), _mm512_unpackhi_ps(v2, v3));
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
}

}  // namespace nanochat_x::kernels
#endif
