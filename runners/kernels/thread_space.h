#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace nanochat_x::kernels {

/// What a thread keeps room for. One product uses each for one thing at a time.
enum class Space { work, weights };

/// Room for so many values, from the begin of a cache line: a load of 64 bytes that is not aligned reads two. It is
/// the thread's, one for all of the same type and use, and stays, so that a step of a model allocates nothing.
template <typename Value, Space>
Value* thread_space(std::int64_t values) {
  constexpr std::size_t kLine = 64;
  static thread_local std::vector<Value> space;
  const std::size_t wanted = static_cast<std::size_t>(values) + kLine / sizeof(Value);
  if (space.size() < wanted) space.resize(wanted);
  const auto past = reinterpret_cast<std::uintptr_t>(space.data()) % kLine;
  return space.data() + (kLine - past) % kLine / sizeof(Value);
}

}  // namespace nanochat_x::kernels
