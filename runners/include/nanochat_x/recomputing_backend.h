#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "nanochat_x/backend.h"

namespace nanochat_x {

/// Gives a program without a KV cache the face of one with it: the "cache" keeps token ids, and every step computes its
/// rows' whole sequences anew. Right, and slow: a step costs what a pass over the whole text costs.
class RecomputingBackend final : public Backend {
 public:
  RecomputingBackend(std::unique_ptr<Backend> backend, const Manifest& manifest);

  Logits forward(std::span<const std::int64_t> ids, std::int64_t batch, std::int64_t length) override;
  Logits step(const Step& step, Cache& cache) override;
  std::unique_ptr<Cache> new_cache(std::int64_t rows, std::int64_t capacity) override;

 private:
  std::unique_ptr<Backend> backend_;
  std::int64_t vocab_size_;
};

}  // namespace nanochat_x
