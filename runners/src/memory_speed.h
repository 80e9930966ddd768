#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace nanochat_x::internal {

/// How fast this machine's memory can be read: threads add up an array that no cache holds, each its own part.
class MemorySpeed {
 public:
  /// An array of `bytes`; 0: 512 MiB, or 8 times the largest cache where that is more. Throws Error for less than 1
  /// thread, and where there is not memory enough.
  explicit MemorySpeed(int threads, std::size_t bytes = 0);
  ~MemorySpeed();
  MemorySpeed(const MemorySpeed&) = delete;
  MemorySpeed& operator=(const MemorySpeed&) = delete;

  std::size_t bytes() const;
  /// Reads all of it once; returns bytes a second.
  double measure();
  /// What the last `measure` found: every word is 1, so it is the number of words if all of them were read.
  std::uint64_t sum() const { return sum_; }

 private:
  struct Free {
    void operator()(std::uint64_t* p) const;
  };
  std::span<const std::uint64_t> part(int thread) const;

  int threads_;
  std::size_t words_;
  std::unique_ptr<std::uint64_t, Free> data_;
  std::uint64_t sum_ = 0;
};

}  // namespace nanochat_x::internal
