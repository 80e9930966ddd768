#include "machine.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstdint>
#include <system_error>

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

/// Takes the next number, and the '.' behind it, off a version; 0 where there is none, and nothing is left then.
std::uint64_t take_number(std::string_view& version) {
  std::uint64_t number = 0;
  const char* const end = version.data() + version.size();
  const auto [stop, code] = std::from_chars(version.data(), end, number);
  const bool more = code == std::errc() && stop != end && *stop == '.';
  version.remove_prefix(more ? static_cast<std::size_t>(stop + 1 - version.data()) : version.size());
  return number;
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

std::string_view major_minor(std::string_view version) {
  const std::size_t dot = version.find('.');
  if (dot == std::string_view::npos) return version;
  const std::size_t end = version.find_first_not_of("0123456789", dot + 1);
  return version.substr(0, end);
}

bool is_older(std::string_view version, std::string_view other) {
  while (!other.empty()) {
    const std::uint64_t mine = take_number(version), its = take_number(other);
    if (mine != its) return mine < its;
  }
  return false;
}

std::string march_remedy(const std::string& lower_command) {
  if (cpu_is_x86_64_v3()) return "lower it with --march x86-64-v3, or on this machine: " + lower_command;
  return "lower it on this machine: " + lower_command;
}

}  // namespace nanochat_x::internal
