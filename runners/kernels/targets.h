#pragma once

// Which instruction sets the kernels are compiled for, before Highway's headers are seen. Left out are those that would
// only add code: machines with SSSE3 and SSE4 but without AVX2 take the plain version, and the kernels keep arrays of
// vectors, which those of SVE, whose length the compiler does not know, cannot be.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
