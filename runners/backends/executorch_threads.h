#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace nanochat_x::executorch_operators {

/// Threads for work that comes in pieces of microseconds, hundreds of them a token. ExecuTorch's pool puts its threads
/// to sleep behind each, and waking one takes as long as a small product; here they look for more work a while first.
class Threads {
 public:
  /// `count` threads, the caller's included; 1 or more.
  explicit Threads(int count);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int count() const { return static_cast<int>(workers_.size()) + 1; }

  /// Calls work(i) for i in [0, count()), each on a thread of its own, and returns when all have. `work` must not
  /// throw. One call at a time: others wait.
  void run(const std::function<void(int)>& work);

 private:
  void serve(int index);

  std::mutex mutex_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<std::uint32_t> round_ = 0;
  std::atomic<int> busy_ = 0;
  std::atomic<bool> ends_ = false;
  std::vector<std::thread> workers_;
};

/// Those that the operators work on: as many as the processor has, until `set_threads`.
Threads& threads();
void set_threads(int count);

}  // namespace nanochat_x::executorch_operators
