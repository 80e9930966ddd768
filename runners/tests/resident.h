#pragma once

#include <cstddef>
#include <cstdint>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>

namespace nanochat_x::test {

/// Bytes of a mapping that are memory of this process; none where the system does not tell (as Linux does).
inline std::optional<std::size_t> resident_bytes(const void* begin) {
  std::ifstream maps("/proc/self/smaps");
  std::ostringstream wanted;
  wanted << std::hex << reinterpret_cast<std::uintptr_t>(begin) << '-';
  bool there = false;
  for (std::string line; std::getline(maps, line);) {
    if (line.starts_with(wanted.str())) there = true;
    if (there && line.starts_with("Rss:")) return std::stoull(line.substr(4)) * 1024;
  }
  return std::nullopt;
}

}  // namespace nanochat_x::test
