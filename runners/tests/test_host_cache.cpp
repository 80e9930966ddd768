#include <doctest/doctest.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "error_of.h"
#include "nanochat_x/host_cache.h"

using namespace nanochat_x;
using namespace nanochat_x::test;

namespace {

constexpr std::int64_t kLayers = 2, kHeads = 3, kWidth = 4;

Manifest manifest(const char* dtype = "float32") {
  Manifest m;
  m.dtype = dtype;
  m.n_layer = kLayers;
  m.n_kv_head = kHeads;
  m.head_dim = kWidth;
  return m;
}

/// A number that tells where an element belongs.
float mark(std::int64_t layer, std::int64_t row, std::int64_t head, std::int64_t position, std::int64_t d) {
  return static_cast<float>((((layer * 10 + row) * 10 + head) * 100 + position) * 10 + d);
}

/// New keys for `append`: rows marked with the positions that they will have.
std::vector<float> new_rows(const std::vector<std::int64_t>& position, std::int64_t length) {
  std::vector<float> out;
  const auto rows = static_cast<std::int64_t>(position.size());
  for (std::int64_t l = 0; l < kLayers; ++l)
    for (std::int64_t b = 0; b < rows; ++b)
      for (std::int64_t h = 0; h < kHeads; ++h)
        for (std::int64_t t = 0; t < length; ++t)
          for (std::int64_t d = 0; d < kWidth; ++d)
            out.push_back(mark(l, b, h, position[static_cast<std::size_t>(b)] + t, d));
  return out;
}

void append(HostCache& cache, const std::vector<std::int64_t>& position, std::int64_t length) {
  const std::vector<float> keys = new_rows(position, length);
  std::vector<float> values = keys;
  for (float& v : values) v = -v;
  cache.append(reinterpret_cast<const std::byte*>(keys.data()), reinterpret_cast<const std::byte*>(values.data()),
               position, length);
}

float element(std::byte* base, const HostCache& cache, std::int64_t l, std::int64_t b, std::int64_t h, std::int64_t s,
              std::int64_t d) {
  const std::int64_t index = (((l * cache.rows() + b) * kHeads + h) * cache.capacity() + s) * kWidth + d;
  float value = 0;
  std::memcpy(&value, base + index * 4, 4);
  return value;
}

/// Every element: positions below lengths[b] are those of row sources[b], the rest zero. Counts the ones that are not.
int wrong_elements(HostCache& cache, const std::vector<std::int64_t>& sources,
                   const std::vector<std::int64_t>& lengths) {
  int wrong = 0;
  for (std::int64_t l = 0; l < kLayers; ++l)
    for (std::int64_t b = 0; b < cache.rows(); ++b)
      for (std::int64_t h = 0; h < kHeads; ++h)
        for (std::int64_t s = 0; s < cache.capacity(); ++s)
          for (std::int64_t d = 0; d < kWidth; ++d) {
            const auto row = static_cast<std::size_t>(b);
            const float expected = s < lengths[row] ? mark(l, sources[row], h, s, d) : 0.0F;
            wrong += element(cache.keys(), cache, l, b, h, s, d) != expected;
            wrong += element(cache.values(), cache, l, b, h, s, d) != -expected;
          }
  return wrong;
}

}  // namespace

TEST_CASE("a new cache is zero, and rows land at their own positions") {
  HostCache cache(manifest(), 3, 7);
  CHECK(cache.rows() == 3);
  CHECK(cache.capacity() == 7);
  CHECK(wrong_elements(cache, {0, 1, 2}, {0, 0, 0}) == 0);
  append(cache, {0, 0, 0}, 2);
  CHECK(wrong_elements(cache, {0, 1, 2}, {2, 2, 2}) == 0);
  CHECK(wrong_elements(cache, {0, 1, 2}, {2, 2, 1}) > 0);  // the check sees a wrong length
  CHECK(wrong_elements(cache, {0, 2, 1}, {2, 2, 2}) > 0);  // and a wrong row
  append(cache, {1, 2, 0}, 5);                             // overwriting, appending, to the last position of row 1
  CHECK(wrong_elements(cache, {0, 1, 2}, {6, 7, 5}) == 0);
  append(cache, {7, 7, 7}, 0);
  CHECK(wrong_elements(cache, {0, 1, 2}, {6, 7, 5}) == 0);
}

TEST_CASE("a copy grows, forks and drops rows") {
  HostCache cache(manifest(), 2, 5);
  append(cache, {0, 0}, 4);
  const auto copy = [&](const std::vector<std::int64_t>& source, std::int64_t length, std::int64_t capacity) {
    std::unique_ptr<Cache> made = cache.copy(source, length, capacity);
    auto* host = dynamic_cast<HostCache*>(made.get());
    REQUIRE(host != nullptr);
    CHECK(host->rows() == static_cast<std::int64_t>(source.size()));
    CHECK(host->capacity() == capacity);
    const std::vector<std::int64_t> lengths(source.size(), length);
    return wrong_elements(*host, source, lengths);
  };
  CHECK(copy({0, 1}, 4, 9) == 0);
  CHECK(copy({1, 1, 1, 0}, 3, 5) == 0);
  CHECK(copy({1}, 4, 4) == 0);
  CHECK(copy({0}, 0, 3) == 0);
  CHECK(copy({1, 0}, 0, 0) == 0);
  CHECK(wrong_elements(cache, {0, 1}, {4, 4}) == 0);  // the original is as it was
}

TEST_CASE("two bytes an element") {
  for (const char* dtype : {"bfloat16", "float16"}) {
    HostCache cache(manifest(dtype), 1, 2);
    std::vector<std::uint16_t> rows(kLayers * kHeads * kWidth);
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<std::uint16_t>(i + 1);
    const auto* bytes = reinterpret_cast<const std::byte*>(rows.data());
    const std::int64_t position[] = {1};
    cache.append(bytes, bytes, position, 1);
    std::vector<std::uint16_t> all(rows.size() * 2);
    std::memcpy(all.data(), cache.values(), all.size() * 2);
    // [layer x head, capacity 2, width]: the second half of each pair of positions
    CHECK(all[0] == 0);
    CHECK(all[kWidth] == 1);
    CHECK(all[kWidth + 3] == 4);
    CHECK(all[2 * kWidth] == 0);
    CHECK(all[3 * kWidth] == kWidth + 1);
    CHECK(all.back() == rows.back());
  }
}

TEST_CASE("what a cache refuses") {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  CHECK(contains(error_of([] { HostCache(manifest("int8"), 1, 1); }), "cannot hold int8"));
  CHECK(contains(error_of([] { HostCache(manifest(), 0, 1); }), "needs 1 row or more, not 0"));
  CHECK(contains(error_of([] { HostCache(manifest(), 1, -1); }), "cannot have room for -1"));
  CHECK(contains(error_of([] { HostCache(manifest(), kMost, kMost); }), "larger than any memory"));
  Manifest no_layers = manifest();
  no_layers.n_layer = 0;
  CHECK(contains(error_of([&] { HostCache(no_layers, 1, 1); }), "must be 1 or more"));

  HostCache cache(manifest(), 2, 5);
  append(cache, {0, 0}, 4);
  const auto append_error = [&](const std::vector<std::int64_t>& position, std::int64_t length) {
    return error_of([&] { cache.append(nullptr, nullptr, position, length); });
  };
  CHECK(contains(append_error({0}, 1), "has 2 rows, but 1 positions"));
  CHECK(contains(append_error({0, 5}, 1), "has room for 5 positions, not for 1 more at 5"));
  CHECK(contains(append_error({0, 0}, 6), "not for 6 more at 0"));
  CHECK(contains(append_error({-1, 0}, 1), "at -1"));
  CHECK(contains(append_error({0, 0}, -1), "not for -1 more"));
  CHECK(contains(append_error({kMost, 0}, kMost), "has room for 5 positions"));

  const auto copy_error = [&](const std::vector<std::int64_t>& source, std::int64_t length, std::int64_t capacity) {
    return error_of([&] { (void)cache.copy(source, length, capacity); });
  };
  CHECK(contains(copy_error({2}, 1, 5), "has no row 2, only 0 to 1"));
  CHECK(contains(copy_error({-1}, 1, 5), "has no row -1"));
  CHECK(contains(copy_error({0}, 6, 9), "cannot copy 6 positions"));
  CHECK(contains(copy_error({0}, 4, 3), "cannot copy 4 positions from a KV cache of 5 to one of 3"));
  CHECK(contains(copy_error({0}, -1, 3), "cannot copy -1 positions"));
  CHECK(contains(copy_error({}, 1, 3), "needs 1 row or more"));
  CHECK(wrong_elements(cache, {0, 1}, {4, 4}) == 0);
}

TEST_CASE("rows of a part of the cache") {
  HostCache cache(manifest(), 3, 5);
  append(cache, {0, 0, 0}, 2);
  constexpr std::size_t kRow = kLayers * kHeads * kWidth;
  std::vector<float> rows(kRow);
  for (std::size_t i = 0; i < kRow; ++i) rows[i] = 1000.0F + static_cast<float>(i);
  const auto* bytes = reinterpret_cast<const std::byte*>(rows.data());
  const std::int64_t position[] = {4};
  const auto* keys = reinterpret_cast<const float*>(cache.keys());
  const std::vector<float> before(keys, keys + kRow * 3 * 5);
  cache.append_rows(bytes, bytes, 1, position, 1);
  std::size_t changed = 0;
  for (std::size_t i = 0; i < before.size(); ++i) changed += keys[i] != before[i] ? 1 : 0;
  CHECK(changed == kRow);
  for (std::int64_t layer = 0; layer < kLayers; ++layer) {
    for (std::int64_t head = 0; head < kHeads; ++head) {  // [layer, row 1, head, position 4, width]
      CHECK(keys[(((layer * 3 + 1) * kHeads + head) * 5 + 4) * kWidth] ==
            1000.0F + static_cast<float>((layer * kHeads + head) * kWidth));
    }
  }
  const auto refused = [&](std::int64_t first) {
    return error_of([&] { cache.append_rows(bytes, bytes, first, position, 1); });
  };
  CHECK(contains(refused(3), "has 3 rows, not 1 from row 3 on"));
  CHECK(contains(refused(-1), "not 1 from row -1 on"));
}
