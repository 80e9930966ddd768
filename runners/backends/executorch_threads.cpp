#include "executorch_threads.h"

#include <algorithm>
#include <memory>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace nanochat_x::executorch_operators {
namespace {

// About 100 us: what stands between two products of a step is less.
constexpr int kSpins = 3000;

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#endif
}

std::unique_ptr<Threads>& pool() {
  static std::unique_ptr<Threads> threads =
      std::make_unique<Threads>(static_cast<int>(std::max(1U, std::thread::hardware_concurrency())));
  return threads;
}

}  // namespace

Threads::Threads(int count) {
  for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { serve(i); });
}

Threads::~Threads() {
  ends_ = true;
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Threads::run(const std::function<void(int)>& work) {
  const std::scoped_lock lock(mutex_);
  work_ = &work;
  busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  work(0);
  for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < kSpins) {
      relax();
    } else {
      std::this_thread::yield();  // a worker waits for a core
    }
  }
}

void Threads::serve(int index) {
  for (std::uint32_t seen = 0;;) {
    for (int spins = 0; spins < kSpins && round_.load(std::memory_order_acquire) == seen; ++spins) relax();
    round_.wait(seen, std::memory_order_acquire);
    ++seen;
    if (ends_) return;
    (*work_)(index);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

Threads& threads() { return *pool(); }

void set_threads(int count) {
  if (count != threads().count()) pool() = std::make_unique<Threads>(count);
}

}  // namespace nanochat_x::executorch_operators
