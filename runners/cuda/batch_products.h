#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "decoder.h"

namespace nanochat_x::cuda {

/// The arrays of a step of one token a row, on the card; of `tokens` rows each.
struct BatchArrays {
  std::int64_t tokens = 0;
  float *x = nullptr, *x0 = nullptr, *middle = nullptr;   ///< [., n_embd]: stream, embedding, the layer to back out
  __nv_bfloat16 *rounded = nullptr, *attended = nullptr;  ///< [., n_embd]: the stream, what attention gives
  __nv_bfloat16 *qkv = nullptr, *hidden = nullptr;        ///< [., heads * 128], [., mlp_width]
  float *squares = nullptr, *norm_factor = nullptr;       ///< [., kSquares]: of the stream, by parts; [.]
};

struct Warming;

/// The products of a step of one token for each of up to 64 rows, with what lies between them, by kernels of this
/// project (batch_product.cuh): at so few rows cuBLASLt's wait for memory from their begin to their end.
class BatchProducts {
 public:
  static constexpr std::int64_t kMostRows = 64, kSquares = 32;

  /// The memory that both point to must outlive this. Throws Error if the driver has no tensor maps.
  BatchProducts(const DecoderModel& model, const BatchArrays& arrays);
  ~BatchProducts();
  BatchProducts(BatchProducts&&) noexcept;
  BatchProducts& operator=(BatchProducts&&) noexcept;

  /// What a layer's heads take of the stream: qkv, and norm_factor.
  void heads(std::size_t layer, std::int64_t rows, cudaStream_t stream);
  /// What attention gives, added to the stream.
  void add_attended(std::size_t layer, std::int64_t rows, cudaStream_t stream);
  /// The MLP, added to the stream, which then becomes what the next layer, or the head, takes.
  void add_mlp(std::size_t layer, std::int64_t rows, const Warming& next, cudaStream_t stream);
  /// To `out`, float32 [rows, vocab], on the card or page-locked.
  void logits(std::int64_t rows, float* out, cudaStream_t stream);

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace nanochat_x::cuda
