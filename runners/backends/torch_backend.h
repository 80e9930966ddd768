#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "nanochat_x/backend.h"

namespace nanochat_x {

/// What the targets that run on libtorch share: tensors over the engine's memory, the KV cache in host memory, and
/// outputs that are checked before they are read. A target loads its programs and calls them.
class TorchBackend : public Backend {
 public:
  Logits forward(std::span<const std::int64_t> ids, std::int64_t batch, std::int64_t length) override;
  Logits step(const Step& step, Cache& cache) override;
  std::unique_ptr<Cache> new_cache(std::int64_t rows, std::int64_t capacity) override;
  // A piece makes all matrices floats once, whatever its length: on 2 cores of an Intel Xeon (Emerald Rapids) d12 read
  // 512 tokens 1.05 to 1.07 times as fast as in two pieces of 256.
  std::int64_t prefill_chunk() const override { return 512; }

 protected:
  TorchBackend(const Bundle& bundle, const BackendOptions& options);

  /// Runs the program of a role on the contract's inputs, which it must not write to. May throw what libtorch throws.
  virtual std::vector<at::Tensor> call(const std::string& role, const std::vector<at::Tensor>& inputs) = 0;

  const Bundle& bundle() const { return bundle_; }
  /// Path of a role's file in the bundle. Throws Error if the bundle has none.
  const std::string& file_of(const std::string& role) const;

 private:
  Logits run_cached(const std::string& role, const Step& step, Cache& cache);
  std::vector<at::Tensor> run(const std::string& role, const std::vector<at::Tensor>& inputs, std::size_t expected);
  at::Tensor checked_logits(const at::Tensor& tensor, const std::string& role, std::int64_t batch,
                            std::int64_t length) const;

  Bundle bundle_;
};

/// libtorch's type for a manifest's ("float32") or a safetensors file's ("F32"). Throws Error.
at::ScalarType scalar_type(const std::string& dtype);
/// A tensor over memory that somebody else keeps and that nobody may write to.
at::Tensor borrow(const void* data, const std::vector<std::int64_t>& shape, at::ScalarType type);
/// "[2, 3]".
std::string shape_text(at::IntArrayRef shape);

}  // namespace nanochat_x
