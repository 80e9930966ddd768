#pragma once

// Sums that go from one cluster to all others within a launch. A word carries four of them and a flag, so that no
// barrier is needed: a reader asks for the word until it carries the flag of this layer. One way through the L2 cache,
// in the place of a barrier's three.
//
// Blocks of the same rank exchange with each other alone. A word may be overwritten when whoever writes there has words
// of each of its readers that these wrote after reading it. Of attention not every cluster writes, so the words of the
// MLP are written in turns to two places: a cluster may be a layer ahead of another that has no heads.

#include <cstdint>

#include "decode_params.h"

namespace nanochat_x::cuda {

__device__ inline void store_word(Word* to, std::uint32_t value, unsigned flag) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"((static_cast<Word>(flag) << 32U) | value)
               : "memory");
}

__device__ inline Word await_word(const Word* from, unsigned flag) {
  Word word;
  do {
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  } while (static_cast<unsigned>(word >> 32U) != flag);
  return word;
}

// Each sum loses the lowest 8 of its 32 bits, rounded to nearest.
__device__ inline void store_sums(uint4* to, float4 sums, unsigned flag) {
  const auto rounded = [](float value) { return __float_as_uint(value) + 0x80U; };
  const std::uint32_t a = rounded(sums.x), b = rounded(sums.y), c = rounded(sums.z), d = rounded(sums.w);
  const std::uint32_t first = __byte_perm(a, b, 0x5321), second = __byte_perm(b, c, 0x6532),
                      third = __byte_perm(c, d, 0x7653);
  asm volatile(
      "{\n .reg .b64 low, high;\n .reg .b128 word;\n mov.b64 low, {%1, %2};\n mov.b64 high, {%3, %4};\n"
      " mov.b128 word, {low, high};\n st.relaxed.gpu.global.b128 [%0], word;\n}" ::"l"(to),
      "r"(first), "r"(second), "r"(third), "r"(flag)
      : "memory");
}

__device__ inline uint4 load_sums(const uint4* from) {
  uint4 word;
  asm volatile(
      "{\n .reg .b64 low, high;\n .reg .b128 word;\n ld.relaxed.gpu.global.b128 word, [%4];\n"
      " mov.b128 {low, high}, word;\n mov.b64 {%0, %1}, low;\n mov.b64 {%2, %3}, high;\n}"
      : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
      : "l"(from)
      : "memory");
  return word;
}

__device__ inline float4 sums_of(const uint4& word) {
  return make_float4(__uint_as_float(word.x << 8U), __uint_as_float(__byte_perm(word.x, word.y, 0x5430) & 0xffffff00U),
                     __uint_as_float(__byte_perm(word.y, word.z, 0x4320) & 0xffffff00U),
                     __uint_as_float(word.z & 0xffffff00U));
}

}  // namespace nanochat_x::cuda
