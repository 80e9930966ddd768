// Which instructions this machine runs. Asked of the CPU itself and not of __builtin_cpu_supports, which takes literals
// alone, knows other names in every compiler version and does not exist in MSVC.
#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "nanochat_x/bundle.h"

#if defined(__x86_64__) || defined(_M_X64)
#define NANOCHAT_X_X86_64 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace nanochat_x {

namespace {

/// "avx512_vnni", "avx512-vnni" and "avx512vnni" are one name, and so are "sse4.2" and "sse4_2".
std::string plain_name(std::string_view name) {
  std::string out;
  for (const char c : name) {
    if (c != '_' && c != '-' && c != '.') out += c;
  }
  return out;
}

#if defined(NANOCHAT_X_X86_64)

enum Register { eax, ebx, ecx, edx };

/// Registers that the operating system must save on a switch (bits of XCR0).
enum State : std::uint64_t { none = 0, ymm = 0x6, zmm = 0xe6, tile = 0x60000 };

struct Feature {
  std::string_view name;  // plain
  std::uint32_t leaf, subleaf;
  Register reg;
  unsigned bit;
  State state;
};

// Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E. Aliases are Linux' names (/proc/cpuinfo).
constexpr Feature kFeatures[] = {
    {"cx8", 1, 0, edx, 8, none},
    {"cmov", 1, 0, edx, 15, none},
    {"mmx", 1, 0, edx, 23, none},
    {"fxsr", 1, 0, edx, 24, none},
    {"sse", 1, 0, edx, 25, none},
    {"sse2", 1, 0, edx, 26, none},
    {"sse3", 1, 0, ecx, 0, none},
    {"pni", 1, 0, ecx, 0, none},
    {"pclmul", 1, 0, ecx, 1, none},
    {"pclmulqdq", 1, 0, ecx, 1, none},
    {"ssse3", 1, 0, ecx, 9, none},
    {"fma", 1, 0, ecx, 12, ymm},
    {"cx16", 1, 0, ecx, 13, none},
    {"sse41", 1, 0, ecx, 19, none},
    {"sse42", 1, 0, ecx, 20, none},
    {"movbe", 1, 0, ecx, 22, none},
    {"popcnt", 1, 0, ecx, 23, none},
    {"aes", 1, 0, ecx, 25, none},
    {"xsave", 1, 0, ecx, 26, none},
    {"osxsave", 1, 0, ecx, 27, none},
    {"avx", 1, 0, ecx, 28, ymm},
    {"f16c", 1, 0, ecx, 29, ymm},
    {"rdrnd", 1, 0, ecx, 30, none},
    {"rdrand", 1, 0, ecx, 30, none},
    {"fsgsbase", 7, 0, ebx, 0, none},
    {"bmi", 7, 0, ebx, 3, none},
    {"bmi1", 7, 0, ebx, 3, none},
    {"avx2", 7, 0, ebx, 5, ymm},
    {"bmi2", 7, 0, ebx, 8, none},
    {"avx512f", 7, 0, ebx, 16, zmm},
    {"avx512dq", 7, 0, ebx, 17, zmm},
    {"rdseed", 7, 0, ebx, 18, none},
    {"adx", 7, 0, ebx, 19, none},
    {"avx512ifma", 7, 0, ebx, 21, zmm},
    {"clflushopt", 7, 0, ebx, 23, none},
    {"clwb", 7, 0, ebx, 24, none},
    {"avx512cd", 7, 0, ebx, 28, zmm},
    {"sha", 7, 0, ebx, 29, none},
    {"shani", 7, 0, ebx, 29, none},
    {"avx512bw", 7, 0, ebx, 30, zmm},
    {"avx512vl", 7, 0, ebx, 31, zmm},
    {"avx512vbmi", 7, 0, ecx, 1, zmm},
    {"pku", 7, 0, ecx, 3, none},
    {"waitpkg", 7, 0, ecx, 5, none},
    {"avx512vbmi2", 7, 0, ecx, 6, zmm},
    {"gfni", 7, 0, ecx, 8, none},
    {"vaes", 7, 0, ecx, 9, ymm},
    {"vpclmulqdq", 7, 0, ecx, 10, ymm},
    {"avx512vnni", 7, 0, ecx, 11, zmm},
    {"avx512bitalg", 7, 0, ecx, 12, zmm},
    {"avx512vpopcntdq", 7, 0, ecx, 14, zmm},
    {"rdpid", 7, 0, ecx, 22, none},
    {"movdiri", 7, 0, ecx, 27, none},
    {"movdir64b", 7, 0, ecx, 28, none},
    {"avx512vp2intersect", 7, 0, edx, 8, zmm},
    {"serialize", 7, 0, edx, 14, none},
    {"amxbf16", 7, 0, edx, 22, tile},
    {"avx512fp16", 7, 0, edx, 23, zmm},
    {"amxtile", 7, 0, edx, 24, tile},
    {"amxint8", 7, 0, edx, 25, tile},
    {"avxvnni", 7, 1, eax, 4, ymm},
    {"avx512bf16", 7, 1, eax, 5, zmm},
    {"amxfp16", 7, 1, eax, 21, tile},
    {"avxifma", 7, 1, eax, 23, ymm},
    {"avxvnniint8", 7, 1, edx, 4, ymm},
    {"avxneconvert", 7, 1, edx, 5, ymm},
    {"amxcomplex", 7, 1, edx, 8, tile},
    {"avxvnniint16", 7, 1, edx, 10, ymm},
    {"xsaveopt", 0xd, 1, eax, 0, none},
    {"xsavec", 0xd, 1, eax, 1, none},
    {"lahflm", 0x80000001, 0, ecx, 0, none},
    {"sahf", 0x80000001, 0, ecx, 0, none},
    {"lzcnt", 0x80000001, 0, ecx, 5, none},
    {"abm", 0x80000001, 0, ecx, 5, none},
    {"sse4a", 0x80000001, 0, ecx, 6, none},
    {"prfchw", 0x80000001, 0, ecx, 8, none},
    {"3dnowprefetch", 0x80000001, 0, ecx, 8, none},
    {"lm", 0x80000001, 0, edx, 29, none},
};

using Registers = std::array<std::uint32_t, 4>;

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
#if defined(_MSC_VER)
  int r[4];
  __cpuidex(r, static_cast<int>(leaf), static_cast<int>(subleaf));
  return {static_cast<std::uint32_t>(r[0]), static_cast<std::uint32_t>(r[1]), static_cast<std::uint32_t>(r[2]),
          static_cast<std::uint32_t>(r[3])};
#else
  Registers r{};
  __cpuid_count(leaf, subleaf, r[eax], r[ebx], r[ecx], r[edx]);
  return r;
#endif
}

/// Zeros where the CPU does not know the leaf (it would answer with another leaf's bits).
Registers checked_cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  if (cpuid(leaf & 0x80000000U, 0)[eax] < leaf) return {};
  if (leaf == 7 && cpuid(7, 0)[eax] < subleaf) return {};
  return cpuid(leaf, subleaf);
}

std::uint64_t saved_states() {
  constexpr unsigned kOsxsave = 27;
  if ((cpuid(1, 0)[ecx] >> kOsxsave & 1U) == 0) return 0;
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return std::uint64_t{high} << 32 | low;
#endif
}

bool has(std::string_view name) {
  const auto* found =
      std::find_if(std::begin(kFeatures), std::end(kFeatures), [&](const Feature& f) { return f.name == name; });
  if (found == std::end(kFeatures)) return false;
  if (found->state != none && (saved_states() & found->state) != found->state) return false;
  return (checked_cpuid(found->leaf, found->subleaf)[found->reg] >> found->bit & 1U) != 0;
}

#elif defined(__aarch64__) && defined(__linux__)

struct Feature {
  std::string_view name;
  unsigned long type, bit;
};

// Linux: arch/arm64/include/uapi/asm/hwcap.h
constexpr Feature kFeatures[] = {
    {"neon", AT_HWCAP, 1},      {"asimd", AT_HWCAP, 1},    {"aes", AT_HWCAP, 3},      {"crc32", AT_HWCAP, 7},
    {"lse", AT_HWCAP, 8},       {"atomics", AT_HWCAP, 8},  {"fphp", AT_HWCAP, 9},     {"fp16", AT_HWCAP, 10},
    {"asimdhp", AT_HWCAP, 10},  {"dotprod", AT_HWCAP, 20}, {"asimddp", AT_HWCAP, 20}, {"sve", AT_HWCAP, 22},
    {"asimdfhm", AT_HWCAP, 23}, {"sve2", AT_HWCAP2, 1},    {"i8mm", AT_HWCAP2, 13},   {"bf16", AT_HWCAP2, 14},
};

bool has(std::string_view name) {
  const auto* found =
      std::find_if(std::begin(kFeatures), std::end(kFeatures), [&](const Feature& f) { return f.name == name; });
  return found != std::end(kFeatures) && (getauxval(found->type) >> found->bit & 1UL) != 0;
}

#elif defined(__aarch64__) && defined(__APPLE__)

struct Feature {
  std::string_view name;
  const char* sysctl;
};

constexpr Feature kFeatures[] = {
    {"aes", "hw.optional.arm.FEAT_AES"},         {"crc32", "hw.optional.armv8_crc32"},
    {"lse", "hw.optional.arm.FEAT_LSE"},         {"fp16", "hw.optional.arm.FEAT_FP16"},
    {"dotprod", "hw.optional.arm.FEAT_DotProd"}, {"i8mm", "hw.optional.arm.FEAT_I8MM"},
    {"bf16", "hw.optional.arm.FEAT_BF16"},
};

bool has(std::string_view name) {
  if (name == "neon" || name == "asimd") return true;
  const auto* found =
      std::find_if(std::begin(kFeatures), std::end(kFeatures), [&](const Feature& f) { return f.name == name; });
  int value = 0;
  std::size_t size = sizeof(value);
  return found != std::end(kFeatures) && sysctlbyname(found->sysctl, &value, &size, nullptr, 0) == 0 && value != 0;
}

#else

bool has(std::string_view) { return false; }

#endif

}  // namespace

bool cpu_has_feature(std::string_view name) { return has(plain_name(name)); }

}  // namespace nanochat_x
