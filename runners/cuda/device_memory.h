#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "check.h"

namespace nanochat_x::cuda {

/// An array on the card.
template <typename T>
class DeviceArray {
 public:
  DeviceArray() = default;
  /// `count` elements, zeroed. Throws Error if there is no room.
  explicit DeviceArray(std::size_t count) : count_(count) {
    void* memory = nullptr;
    if (cudaMalloc(&memory, count * sizeof(T)) != cudaSuccess) {
      (void)cudaGetLastError();  // it would be reported again by the next call
      throw Error("no memory on the card for " + std::to_string(count * sizeof(T) >> 20U) + " MiB; ask for less");
    }
    memory_.reset(static_cast<T*>(memory));
    check(cudaMemset(memory, 0, count * sizeof(T)), "clearing memory");
  }
  explicit DeviceArray(std::span<const T> values) : DeviceArray(values.size()) {
    check(cudaMemcpy(data(), values.data(), values.size_bytes(), cudaMemcpyHostToDevice), "copying to the card");
  }

  T* data() const { return memory_.get(); }
  std::size_t size() const { return count_; }

 private:
  struct Free {
    void operator()(T* memory) const { (void)cudaFree(memory); }
  };
  std::unique_ptr<T, Free> memory_;
  std::size_t count_ = 0;
};

}  // namespace nanochat_x::cuda
