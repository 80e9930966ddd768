#include "card_cache.h"

#include <algorithm>
#include <string>
#include <utility>

#include "nanochat_x/error.h"

namespace nanochat_x::cuda {
namespace {

constexpr std::int64_t kHeadDim = 128;

std::size_t elements(std::int64_t n_layer, std::int64_t n_kv_head, std::int64_t rows, std::int64_t capacity) {
  // never 0: an empty cache has an address too
  return static_cast<std::size_t>(n_layer * n_kv_head * rows * std::max<std::int64_t>(capacity, 1) * kHeadDim);
}

}  // namespace

CardCache::CardCache(std::int64_t n_layer, std::int64_t n_kv_head, std::int64_t rows, std::int64_t capacity)
    : n_layer_(n_layer),
      n_kv_head_(n_kv_head),
      rows_(rows),
      capacity_(capacity),
      keys_(elements(n_layer, n_kv_head, rows, capacity)),
      values_(keys_.size()) {}

std::unique_ptr<Cache> CardCache::copy(std::span<const std::int64_t> source, std::int64_t length,
                                       std::int64_t capacity) const {
  if (length < 0 || length > capacity_ || length > capacity) {
    throw Error("cannot copy " + std::to_string(length) + " positions from a KV cache of " + std::to_string(capacity_) +
                " to one of " + std::to_string(capacity));
  }
  const auto rows = static_cast<std::int64_t>(source.size());
  auto result = std::make_unique<CardCache>(n_layer_, n_kv_head_, rows, capacity);
  if (length == 0) return result;
  constexpr std::size_t kBytes = kHeadDim * sizeof(std::uint16_t);
  for (std::int64_t layer = 0; layer < n_layer_; ++layer) {
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t from_row = source[static_cast<std::size_t>(row)];
      if (from_row < 0 || from_row >= rows_) throw Error("the KV cache has no row " + std::to_string(from_row));
      const std::int64_t from = (layer * rows_ + from_row) * n_kv_head_ * capacity_ * kHeadDim;
      const std::int64_t to = (layer * rows + row) * n_kv_head_ * capacity * kHeadDim;
      for (const auto& [target, origin] : {std::pair(result->keys_.data() + to, keys_.data() + from),
                                           std::pair(result->values_.data() + to, values_.data() + from)}) {
        check(cudaMemcpy2DAsync(target, static_cast<std::size_t>(capacity) * kBytes, origin,
                                static_cast<std::size_t>(capacity_) * kBytes, static_cast<std::size_t>(length) * kBytes,
                                static_cast<std::size_t>(n_kv_head_), cudaMemcpyDeviceToDevice, nullptr),
              "copying the KV cache");
      }
    }
  }
  check(cudaStreamSynchronize(nullptr), "copying the KV cache");  // the original may be freed now
  const bool of_one_row = std::ranges::all_of(source, [&](std::int64_t from) { return from == source.front(); });
  result->shared_ = of_one_row ? length : std::min(shared_, length);
  return result;
}

DecoderCache CardCache::row(std::int64_t row) const {
  const std::int64_t begin = row * n_kv_head_ * capacity_ * kHeadDim;
  return {keys_.data() + begin, values_.data() + begin, rows_, capacity_, shared_};
}

}  // namespace nanochat_x::cuda
