#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "check.h"

namespace nanochat_x::cuda {

/// Host memory that the card writes to directly; from a pool, and given back to it.
template <typename T>
class PinnedPool;

template <typename T>
class PinnedArray {
 public:
  T* data() const { return memory_.get(); }

 private:
  friend class PinnedPool<T>;
  struct Free {
    void operator()(T* memory) const { (void)cudaFreeHost(memory); }
  };
  struct Shelf {  // what was given back; a smaller one than asked for is dropped
    std::mutex mutex;
    std::vector<std::pair<std::size_t, std::unique_ptr<T, Free>>> free;
  };

 public:
  PinnedArray(PinnedArray&&) noexcept = default;
  PinnedArray& operator=(PinnedArray&&) = delete;
  ~PinnedArray() {
    if (!memory_) return;
    const std::scoped_lock lock(shelf_->mutex);
    shelf_->free.emplace_back(size_, std::move(memory_));
  }

 private:
  PinnedArray(std::unique_ptr<T, Free> memory, std::size_t size, std::shared_ptr<Shelf> shelf)
      : memory_(std::move(memory)), size_(size), shelf_(std::move(shelf)) {}

  std::unique_ptr<T, Free> memory_;
  std::size_t size_;
  std::shared_ptr<Shelf> shelf_;
};

template <typename T>
class PinnedPool {
 public:
  /// `count` elements of any value. Throws Error if there is no memory.
  PinnedArray<T> take(std::size_t count) {
    {
      const std::scoped_lock lock(shelf_->mutex);
      while (!shelf_->free.empty()) {
        auto [size, memory] = std::move(shelf_->free.back());
        shelf_->free.pop_back();
        if (size >= count) return {std::move(memory), size, shelf_};
      }
    }
    void* memory = nullptr;
    check(cudaMallocHost(&memory, count * sizeof(T)), "taking page-locked memory");
    return {std::unique_ptr<T, typename PinnedArray<T>::Free>(static_cast<T*>(memory)), count, shelf_};
  }

 private:
  std::shared_ptr<typename PinnedArray<T>::Shelf> shelf_ = std::make_shared<typename PinnedArray<T>::Shelf>();
};

}  // namespace nanochat_x::cuda
