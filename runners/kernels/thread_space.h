#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace nanochat_x::kernels {

/// Room for so many float32, from the begin of a cache line: a load of 64 bytes that is not aligned reads two. It is
/// the thread's, one for all, and stays, so that a step of a model allocates nothing.
inline float* thread_space(std::int64_t floats) {
  constexpr std::size_t kLine = 64;
  static thread_local std::vector<float> space;
  const std::size_t wanted = static_cast<std::size_t>(floats) + kLine / sizeof(float);
  if (space.size() < wanted) space.resize(wanted);
  const auto past = reinterpret_cast<std::uintptr_t>(space.data()) % kLine;
  return space.data() + (kLine - past) % kLine / sizeof(float);
}

}  // namespace nanochat_x::kernels
