#pragma once

#include <algorithm>
#include <cstdint>

namespace nanochat_x::kernels {

/// Rows of w that are computed before the next are: they stay in a core's second cache until all of x is done. A
/// multiple of each tile's rows.
inline constexpr std::int64_t kRowsOfBlock = 24;

/// Of a row of x, what is computed with at a time: four rows of that and four of w stay in the first cache, in 24 KiB.
inline constexpr std::int64_t kBytesOfPart = 3072;

/// Bytes that memory is asked for at a time, of the processors that there are kernels for.
inline constexpr std::int64_t kLine = 64;

/// Bytes behind what one row of x is multiplied with that memory is asked for, where w is read as it lies in 16, 8 and
/// 4 bits. On 2 cores of an Intel Xeon (Emerald Rapids), 400 MiB in rows of 768: bfloat16 1.35 times as fast as what
/// the processor sees by itself, 1 KiB 1.2 times, 2 to 8 KiB alike; 4 bits 1.16 times as fast as 1.5 KiB.
inline constexpr std::int64_t kBytesAhead = 4096;

/// Asks for what is computed with next, a few lines with each step of what is computed now. A tile reads its rows side
/// by side, and processors do not follow that as well as memory which is read from one end to the other: so they are
/// asked for in the order in which they lie.
class Ahead {
 public:
  /// Of nothing.
  Ahead() = default;

  /// [begin, end) is what comes next, in bytes; each step asks for `bytes` of it, as whole lines.
  Ahead(const void* begin, const void* end, std::int64_t bytes)
      : at_(static_cast<const char*>(begin)),
        end_(static_cast<const char*>(end)),
        bytes_((bytes + kLine - 1) / kLine * kLine) {}

  /// One step. `cache`: which of a core's it is to come to, 1 or 2.
  template <int cache>
  void fetch() {
#ifdef __GNUC__
    const char* const stop = std::min(end_, at_ + bytes_);
    for (; at_ < stop; at_ += kLine) __builtin_prefetch(at_, 0, 4 - cache);
#endif
  }

 private:
  const char* at_ = nullptr;
  const char* end_ = nullptr;
  std::int64_t bytes_ = 0;
};

/// Calls `work(from, stop, next)` for the blocks of rows [begin, end): rows [from, stop), behind which those before
/// `next` are computed.
template <class Work>
void in_blocks(std::int64_t begin, std::int64_t end, Work work) {
  for (; begin < end; begin += kRowsOfBlock) {
    work(begin, std::min(end, begin + kRowsOfBlock), std::min(end, begin + 2 * kRowsOfBlock));
  }
}

}  // namespace nanochat_x::kernels
