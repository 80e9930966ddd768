#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>

#include "decoder.h"
#include "device_memory.h"
#include "nanochat_x/backend.h"

namespace nanochat_x::cuda {

/// KV cache on the card: bfloat16 [n_layer, rows, n_kv_head, capacity, 128], zeroed when made. It knows what rows have
/// in common as copies of one row: samples of one prompt attend to that together (attend_shared.cuh).
class CardCache final : public Cache {
 public:
  /// Throws Error if the card has no room.
  CardCache(std::int64_t n_layer, std::int64_t n_kv_head, std::int64_t rows, std::int64_t capacity);

  std::int64_t rows() const override { return rows_; }
  std::int64_t capacity() const override { return capacity_; }
  std::unique_ptr<Cache> copy(std::span<const std::int64_t> source, std::int64_t length,
                              std::int64_t capacity) const override;
  /// To be called before a step that writes from `position` on in some row: there its rows are no longer alike.
  void will_write(std::int64_t position) { shared_ = std::min(shared_, position); }
  /// For the kernels.
  DecoderCache row(std::int64_t row) const;

 private:
  std::int64_t n_layer_, n_kv_head_, rows_, capacity_;
  std::int64_t shared_ = 0;  // leading positions that are known to be the same in all rows
  DeviceArray<std::uint16_t> keys_, values_;
};

}  // namespace nanochat_x::cuda
