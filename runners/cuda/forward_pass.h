#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "decoder.h"
#include "nanochat_x/backend.h"

namespace nanochat_x::cuda {

/// A piece of a step that is computed at once: some columns of some rows.
struct Pass {
  std::int64_t first_row = 0, rows = 0, first_column = 0, columns = 0;
};

/// The passes of a step of `batch` rows and `length` tokens, of `most` tokens at most each, in the order in which they
/// have to be computed.
std::vector<Pass> passes_of(std::int64_t batch, std::int64_t length, std::int64_t most);

/// Many tokens at once: prompts, and steps of batches. Reads and writes the cache that `Decoder` does.
class ForwardPass {
 public:
  static constexpr std::int64_t kMostTokens = 2048;  ///< of one pass

  /// `most_tokens`: of one pass, from 1 on; it decides the memory that is taken (38 KB a token at d20). The memory that
  /// the model points to must outlive this; c_q, c_k and c_v of a layer lie one behind the other. Throws Error if the
  /// model or the card is not one for these kernels, cuBLASLt is missing, or without memory.
  explicit ForwardPass(DecoderModel model, std::int64_t most_tokens = kMostTokens);
  ~ForwardPass();
  ForwardPass(ForwardPass&&) noexcept;
  ForwardPass& operator=(ForwardPass&&) noexcept;

  /// Appends keys and values of the step's tokens to `cache` (its first row is the step's first) and writes logits
  /// float32 [batch, R, vocab] to `logits`, page-locked or on the card. Ordered on `stream` (a cudaStream_t, not the
  /// default one), does not wait for the card. In every row cache.shared <= position and position + length <= capacity.
  /// A step of one token a row that is like the one before it, but for tokens and positions, is started as a CUDA
  /// graph.
  void step(const Step& step, const DecoderCache& cache, float* logits, void* stream);

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace nanochat_x::cuda
