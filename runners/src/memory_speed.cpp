#include "memory_speed.h"

#include <algorithm>
#include <array>
#include <barrier>
#include <chrono>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "nanochat_x/error.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace nanochat_x::internal {
namespace {

constexpr std::size_t kLeast = std::size_t{512} << 20;
constexpr std::size_t kMost = std::size_t{4} << 30;
constexpr std::size_t kPage = std::size_t{2} << 20;  // of x86-64's large pages

// Words that are added up side by side: enough for the compiler's vectors, and no sum waits for the one before.
constexpr std::size_t kLanes = 16;

std::size_t chosen_bytes() {
  std::size_t cache = 0;
#if defined(__linux__) && defined(_SC_LEVEL3_CACHE_SIZE)
  cache = static_cast<std::size_t>(std::max(0L, sysconf(_SC_LEVEL3_CACHE_SIZE)));
#endif
  return std::clamp(8 * cache, kLeast, kMost);
}

// Words that are asked for before they are added: a processor that is busy with narrow vectors looks ahead over few
// lines.
constexpr std::size_t kAhead = 256;
constexpr std::size_t kLine = 8;  // words that memory is asked for at a time

std::uint64_t sum_of(std::span<const std::uint64_t> words) {
  std::array<std::uint64_t, kLanes> lanes{};
  std::size_t i = 0;
  for (; i + kLanes <= words.size(); i += kLanes) {
#ifdef __GNUC__
    for (std::size_t lane = 0; lane < kLanes; lane += kLine) __builtin_prefetch(words.data() + i + kAhead + lane);
#endif
    for (std::size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += words[i + lane];
  }
  std::uint64_t sum = 0;
  for (; i < words.size(); ++i) sum += words[i];
  for (const std::uint64_t lane : lanes) sum += lane;
  return sum;
}

}  // namespace

void MemorySpeed::Free::operator()(std::uint64_t* p) const { ::operator delete(p, std::align_val_t{kPage}); }

MemorySpeed::MemorySpeed(int threads, std::size_t bytes)
    : threads_(threads), words_((bytes ? bytes : chosen_bytes()) / 8) {
  if (threads < 1) throw Error("memory is read by at least one thread; got " + std::to_string(threads));
  void* memory = ::operator new(words_ * 8, std::align_val_t{kPage}, std::nothrow);
  if (memory == nullptr) {
    throw Error("there is not memory enough to measure how fast it is: " + std::to_string(words_ * 8) + " bytes");
  }
  data_.reset(static_cast<std::uint64_t*>(memory));
#ifdef __linux__
  // Large pages: what limits is to be the memory, not the look-up of addresses. Without them it is a little slower.
  (void)madvise(memory, words_ * 8, MADV_HUGEPAGE);
#endif
  std::fill_n(data_.get(), words_, std::uint64_t{1});
}

MemorySpeed::~MemorySpeed() = default;

std::size_t MemorySpeed::bytes() const { return words_ * 8; }

std::span<const std::uint64_t> MemorySpeed::part(int thread) const {
  const auto at = [this](int i) { return words_ * static_cast<std::size_t>(i) / static_cast<std::size_t>(threads_); };
  return {data_.get() + at(thread), at(thread + 1) - at(thread)};
}

double MemorySpeed::measure() {
  using Clock = std::chrono::steady_clock;
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(threads_));
  std::vector<Clock::time_point> begins(sums.size()), ends(sums.size());
  std::barrier together(threads_);
  const auto work = [&](int thread) {
    const auto i = static_cast<std::size_t>(thread);
    together.arrive_and_wait();
    begins[i] = Clock::now();
    sums[i] = sum_of(part(thread));
    ends[i] = Clock::now();
  };
  {
    std::vector<std::jthread> others;
    try {
      for (int i = 1; i < threads_; ++i) others.emplace_back(work, i);
    } catch (const std::system_error& error) {
      // those that wait for the ones that never came
      for (auto missing = std::ssize(others) + 1; missing < threads_; ++missing) together.arrive_and_drop();
      together.arrive_and_drop();
      throw Error("cannot start " + std::to_string(threads_) + " threads: " + error.what());
    }
    work(0);
  }
  sum_ = 0;
  for (const std::uint64_t sum : sums) sum_ += sum;
  const std::chrono::duration<double> time = *std::ranges::max_element(ends) - *std::ranges::min_element(begins);
  return static_cast<double>(bytes()) / time.count();
}

}  // namespace nanochat_x::internal
