#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "nanochat_x/backend.h"
#include "nanochat_x/bundle.h"

namespace nanochat_x {

/// KV cache in host memory: `keys()` and `values()` are `[n_layer, rows, n_kv_head, capacity, head_dim]` of elements of
/// `element_size` bytes, zeroed when made. The cached programs read it and return the rows to append.
class HostCache : public Cache {
 public:
  /// Throws Error for fewer than 1 row, a negative capacity, or where there is not memory enough.
  HostCache(const Manifest& manifest, std::int64_t rows, std::int64_t capacity);

  std::int64_t rows() const override { return rows_; }
  std::int64_t capacity() const override { return capacity_; }
  std::unique_ptr<Cache> copy(std::span<const std::int64_t> source, std::int64_t length,
                              std::int64_t capacity) const override;

  std::byte* keys() { return keys_.get(); }
  std::byte* values() { return values_.get(); }

  /// Copies new rows `[n_layer, rows, n_kv_head, length, head_dim]` (contiguous) to position[b] of row b. Throws Error,
  /// with nothing copied, for another number of positions than rows or past the capacity.
  void append(const std::byte* new_keys, const std::byte* new_values, std::span<const std::int64_t> position,
              std::int64_t length);
  /// The same for the position.size() rows from `first_row` on, which is what a program that takes fewer rows returns.
  void append_rows(const std::byte* new_keys, const std::byte* new_values, std::int64_t first_row,
                   std::span<const std::int64_t> position, std::int64_t length);

 private:
  HostCache(std::int64_t n_layer, std::int64_t n_kv_head, std::int64_t head_dim, std::int64_t element_size,
            std::int64_t rows, std::int64_t capacity);
  struct Free {
    void operator()(std::byte* p) const;
  };
  std::int64_t n_layer_, n_kv_head_, head_dim_, element_size_, rows_, capacity_;
  std::unique_ptr<std::byte, Free> keys_, values_;  // calloc: pages that were never written cost no memory
};

}  // namespace nanochat_x
