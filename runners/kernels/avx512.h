#pragma once

/// Intel's intrinsics for files that call instructions by name, with NANOCHAT_X_AVX512 defined where there are any.
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define NANOCHAT_X_AVX512 1
// (gcc 12 takes a value that its own header leaves undefined on purpose for a mistake)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif
