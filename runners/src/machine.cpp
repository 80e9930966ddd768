#include "machine.h"

#include <algorithm>
#include <cctype>

#include "nanochat_x/bundle.h"

namespace nanochat_x::internal {

namespace {

std::string lower_case(std::string_view name) {
  std::string out(name);
  std::transform(out.begin(), out.end(), out.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return out;
}

/// The features that the x86-64 ABI calls x86-64-v3.
bool cpu_is_x86_64_v3() {
  const auto features = {"sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "avx",  "avx2",
                         "bmi",  "bmi2",  "f16c",   "fma",    "lzcnt",  "movbe"};
  return architecture_name() == "x86_64" &&
         std::all_of(features.begin(), features.end(), [](const char* name) { return cpu_has_feature(name); });
}

}  // namespace

std::string platform_name() {
#if defined(_WIN32)
  return "windows";
#elif defined(__APPLE__)
  return "darwin";
#elif defined(__linux__)
  return "linux";
#else
  return "unknown";
#endif
}

std::string architecture_name() {
#if defined(__x86_64__) || defined(_M_X64)
  return "x86_64";
#elif defined(__aarch64__) || defined(_M_ARM64)
  return "aarch64";
#else
  return "unknown";
#endif
}

std::string canonical_platform(std::string_view name) {
  const std::string lower = lower_case(name);
  if (lower == "win32") return "windows";
  if (lower == "macos") return "darwin";
  return lower;
}

std::string canonical_architecture(std::string_view name) {
  const std::string lower = lower_case(name);
  if (lower == "amd64") return "x86_64";
  if (lower == "arm64") return "aarch64";
  return lower;
}

std::string march_remedy(const std::string& lower_command) {
  if (cpu_is_x86_64_v3()) return "lower it with --march x86-64-v3, or on this machine: " + lower_command;
  return "lower it on this machine: " + lower_command;
}

}  // namespace nanochat_x::internal
