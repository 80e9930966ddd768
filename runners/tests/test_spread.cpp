#include <doctest/doctest.h>

#include <limits>

#include "error_of.h"
#include "memory_speed.h"
#include "spread.h"

using namespace nanochat_x::internal;
using nanochat_x::test::error_of;

TEST_CASE("spread: the middle and the ends, in any order") {
  const Spread odd = spread_of({5, 1, 3});
  CHECK(odd.median == 3);
  CHECK(odd.min == 1);
  CHECK(odd.max == 5);
  const Spread even = spread_of({4, 10, 1, 2});
  CHECK(even.median == 3);
  CHECK(even.min == 1);
  CHECK(even.max == 10);
  const Spread one = spread_of({7});
  CHECK(one.median == 7);
  CHECK(one.min == 7);
  CHECK(one.max == 7);
}

TEST_CASE("spread: nothing, and what is no number, is refused") {
  CHECK(error_of([] { spread_of({}); }) == "nothing was measured, so there is no median of it");
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    CHECK(error_of([bad] { spread_of({1, bad}); }) == "a measured value is not finite");
  }
}

TEST_CASE("memory speed: every word is read once, by any number of threads") {
  for (const int threads : {1, 2, 3, 7}) {
    CAPTURE(threads);
    MemorySpeed memory(threads, 8 * 100003);  // no multiple of the lanes, nor of the threads
    CHECK(memory.bytes() == 8 * 100003);
    CHECK(memory.measure() > 0);
    CHECK(memory.sum() == 100003);
    CHECK(memory.measure() > 0);
    CHECK(memory.sum() == 100003);
  }
}

TEST_CASE("memory speed: by default far more than a cache holds") {
  CHECK(MemorySpeed(2).bytes() >= std::size_t{512} << 20);
}

TEST_CASE("memory speed: no thread, and too much memory, is refused") {
  CHECK(error_of([] { MemorySpeed(0, 64); }) == "memory is read by at least one thread; got 0");
  CHECK(error_of([] { MemorySpeed(1, std::size_t{1} << 60); }).find("not memory enough") != std::string::npos);
}
