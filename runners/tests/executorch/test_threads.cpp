#include <doctest/doctest.h>

#include <chrono>
#include <vector>

#include "executorch_threads.h"

using nanochat_x::executorch_operators::Threads;

TEST_CASE("threads: each has its part of every call, whether it slept before or not") {
  for (const int count : {1, 2, 5}) {
    Threads threads(count);
    CHECK(threads.count() == count);
    std::vector<int> calls(static_cast<std::size_t>(count));
    for (int round = 0; round < 300; ++round) {
      if (round % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      threads.run([&](int i) { ++calls[static_cast<std::size_t>(i)]; });
    }
    CHECK(calls == std::vector<int>(static_cast<std::size_t>(count), 300));
  }
}
