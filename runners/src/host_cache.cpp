#include "nanochat_x/host_cache.h"

#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>

#include "nanochat_x/error.h"

namespace nanochat_x {

namespace {

std::int64_t element_size_of(const std::string& dtype) {
  if (dtype == "float32") return 4;
  if (dtype == "bfloat16" || dtype == "float16") return 2;
  throw Error("a KV cache cannot hold " + dtype + "; it holds float32, bfloat16 or float16");
}

/// Product of non-negative sizes; throws Error where it overflows.
std::size_t product(std::initializer_list<std::int64_t> sizes) {
  std::size_t result = 1;
  for (const std::int64_t size : sizes) {
    const auto n = static_cast<std::size_t>(size);
    if (n != 0 && result > static_cast<std::size_t>(std::numeric_limits<std::int64_t>::max()) / n) {
      throw Error("the KV cache would be larger than any memory; ask for fewer rows or positions");
    }
    result *= n;
  }
  return result;
}

std::byte* zeroed(std::size_t bytes) {
  // calloc and not new: pages that were never written cost no memory
  auto* memory = static_cast<std::byte*>(std::calloc(bytes == 0 ? 1 : bytes, 1));
  if (memory == nullptr) {
    throw Error("no memory for a KV cache of 2 x " + std::to_string(bytes >> 20) +
                " MiB; ask for fewer rows or positions");
  }
  return memory;
}

}  // namespace

void HostCache::Free::operator()(std::byte* p) const { std::free(p); }

HostCache::HostCache(const Manifest& manifest, std::int64_t rows, std::int64_t capacity)
    : HostCache(manifest.n_layer, manifest.n_kv_head, manifest.head_dim, element_size_of(manifest.dtype), rows,
                capacity) {}

HostCache::HostCache(std::int64_t n_layer, std::int64_t n_kv_head, std::int64_t head_dim, std::int64_t element_size,
                     std::int64_t rows, std::int64_t capacity)
    : n_layer_(n_layer),
      n_kv_head_(n_kv_head),
      head_dim_(head_dim),
      element_size_(element_size),
      rows_(rows),
      capacity_(capacity) {
  if (n_layer < 1 || n_kv_head < 1 || head_dim < 1)
    throw Error("the model's layers, heads and head width must be 1 or more");
  if (rows < 1) throw Error("a KV cache needs 1 row or more, not " + std::to_string(rows));
  if (capacity < 0) throw Error("a KV cache cannot have room for " + std::to_string(capacity) + " positions");
  const std::size_t bytes = product({n_layer, rows, n_kv_head, capacity, head_dim, element_size});
  keys_.reset(zeroed(bytes));
  values_.reset(zeroed(bytes));
}

std::unique_ptr<Cache> HostCache::copy(std::span<const std::int64_t> source, std::int64_t length,
                                       std::int64_t capacity) const {
  if (length < 0 || length > capacity_ || length > capacity) {
    throw Error("cannot copy " + std::to_string(length) + " positions from a KV cache of " + std::to_string(capacity_) +
                " to one of " + std::to_string(capacity));
  }
  for (const std::int64_t row : source) {
    if (row < 0 || row >= rows_) {
      throw Error("the KV cache has no row " + std::to_string(row) + ", only 0 to " + std::to_string(rows_ - 1));
    }
  }
  const auto rows = static_cast<std::int64_t>(source.size());
  // not make_unique: the constructor is private
  std::unique_ptr<HostCache> result(new HostCache(n_layer_, n_kv_head_, head_dim_, element_size_, rows, capacity));
  const std::int64_t position_bytes = head_dim_ * element_size_;
  const auto bytes = static_cast<std::size_t>(length * position_bytes);
  if (bytes == 0) return result;
  for (std::int64_t layer = 0; layer < n_layer_; ++layer) {
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t head = 0; head < n_kv_head_; ++head) {
        const auto from_row = layer * rows_ + source[static_cast<std::size_t>(row)];
        const auto from = (from_row * n_kv_head_ + head) * capacity_ * position_bytes;
        const auto to = ((layer * rows + row) * n_kv_head_ + head) * capacity * position_bytes;
        std::memcpy(result->keys() + to, keys_.get() + from, bytes);
        std::memcpy(result->values() + to, values_.get() + from, bytes);
      }
    }
  }
  return result;
}

void HostCache::append(const std::byte* new_keys, const std::byte* new_values, std::span<const std::int64_t> position,
                       std::int64_t length) {
  if (static_cast<std::int64_t>(position.size()) != rows_) {
    throw Error("the KV cache has " + std::to_string(rows_) + " rows, but " + std::to_string(position.size()) +
                " positions were given");
  }
  append_rows(new_keys, new_values, 0, position, length);
}

void HostCache::append_rows(const std::byte* new_keys, const std::byte* new_values, std::int64_t first_row,
                            std::span<const std::int64_t> position, std::int64_t length) {
  const auto count = static_cast<std::int64_t>(position.size());
  if (first_row < 0 || first_row > rows_ || count > rows_ - first_row) {
    throw Error("the KV cache has " + std::to_string(rows_) + " rows, not " + std::to_string(count) + " from row " +
                std::to_string(first_row) + " on");
  }
  for (const std::int64_t p : position) {
    if (p < 0 || length < 0 || length > capacity_ || p > capacity_ - length) {
      throw Error("the KV cache has room for " + std::to_string(capacity_) + " positions, not for " +
                  std::to_string(length) + " more at " + std::to_string(p));
    }
  }
  const std::int64_t position_bytes = head_dim_ * element_size_;
  const auto bytes = static_cast<std::size_t>(length * position_bytes);
  if (bytes == 0) return;
  const std::byte *from_keys = new_keys, *from_values = new_values;
  for (std::int64_t layer = 0; layer < n_layer_; ++layer) {
    for (std::int64_t row = 0; row < count; ++row) {
      for (std::int64_t head = 0; head < n_kv_head_; ++head, from_keys += bytes, from_values += bytes) {
        const auto to_head = ((layer * rows_ + first_row + row) * n_kv_head_ + head) * capacity_;
        const auto to = (to_head + position[static_cast<std::size_t>(row)]) * position_bytes;
        std::memcpy(keys() + to, from_keys, bytes);
        std::memcpy(values() + to, from_values, bytes);
      }
    }
  }
}

}  // namespace nanochat_x
