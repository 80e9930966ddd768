#pragma once

#include <cstdint>
#include <memory>

namespace nanochat_x::cuda {

/// Matrix products by NVIDIA's cuBLASLt, which is loaded when the first of these is made.
class Matmul {
 public:
  /// What becomes of a product: bfloat16, float32, or added to the float32 that is there.
  enum class Output : std::uint8_t { bfloat16, float32, add_float32 };

  /// Throws Error if the library is not there, or the card has no room for its workspace (32 MiB).
  Matmul();
  ~Matmul();
  Matmul(Matmul&&) noexcept;
  Matmul& operator=(Matmul&&) noexcept;

  /// out = x * weight^T: x [rows, k] and weight [n, k] bfloat16, out [rows, n]; all row-major, on the card, at
  /// addresses that are multiples of 16. Ordered on `stream` (a cudaStream_t), does not wait for the card, and can be
  /// captured; only one stream may be in use at a time. Throws Error if cuBLASLt has no way for the sizes.
  void multiply(const void* x, const void* weight, void* out, Output output, std::int64_t rows, std::int64_t n,
                std::int64_t k, void* stream);

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace nanochat_x::cuda
