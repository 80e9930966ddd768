// CUDA: the project's own kernels on the weights of a bundle for `aoti`. The bundle's programs, which are for the CPU,
// are not run; what they compute is what the kernels are held to. Needs neither libtorch nor Python.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "card_cache.h"
#include "card_model.h"
#include "check.h"
#include "decoder.h"
#include "forward_pass.h"
#include "nanochat_x/backend.h"
#include "nanochat_x/error.h"
#include "pinned_memory.h"
#include "stream.h"

namespace nanochat_x {
namespace {

void check_card() {
  int count = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&count); status != cudaSuccess || count == 0) {
    throw Error(
        "there is no CUDA device: " + std::string(status == cudaSuccess ? "none found" : cudaGetErrorString(status)) +
        "; a card and its driver are needed, or run the bundle with nanochat-aoti");
  }
}

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const Bundle& bundle) : weights_(bundle), decoder_(weights_.model()), pass_(weights_.model()) {
    weights_.drop_quantized();  // the decoder has packed them
  }

  Logits forward(std::span<const std::int64_t> ids, std::int64_t batch, std::int64_t length) override {
    const auto cache = new_cache(batch, length);
    const std::vector<std::int64_t> zeros(static_cast<std::size_t>(batch));
    std::vector<std::int64_t> all;
    for (std::int64_t i = 0; i < length; ++i) all.push_back(i);
    return step({.input_ids = ids,
                 .prev_ids = zeros,
                 .position = zeros,
                 .logits_to_keep = all,
                 .batch = batch,
                 .length = length},
                *cache);
  }

  // One token of each of few rows is decoded by the kernel that is made for it; all else is computed as many rows.
  Logits step(const Step& step, Cache& cache) override {
    auto& on_card = static_cast<cuda::CardCache&>(cache);
    on_card.will_write(std::ranges::min(step.position));
    const auto kept = std::ssize(step.logits_to_keep);
    const std::int64_t vocab = weights_.model().vocab;
    const auto count = static_cast<std::size_t>(step.batch * kept * vocab);
    auto logits = std::make_shared<cuda::PinnedArray<float>>(buffers_.take(count));
    if (step.length == 1 && step.batch <= decoded_rows()) {
      decode(step, on_card, logits->data());
    } else {
      pass_.step(step, on_card.row(0), logits->data(), stream_.get());
    }
    stream_.wait("computing a step");
    return {{logits->data(), count}, step.batch, kept, vocab, logits};
  }

  std::unique_ptr<Cache> new_cache(std::int64_t rows, std::int64_t capacity) override {
    const auto& model = weights_.model();
    return std::make_unique<cuda::CardCache>(std::ssize(model.layers), model.n_kv_head, rows, capacity);
  }

  std::int64_t prefill_chunk() const override { return cuda::ForwardPass::kMostTokens; }

 private:
  // Rows that the decode kernel computes sooner than a pass does. A pass takes bfloat16, whatever the bundle has.
  std::int64_t decoded_rows() const {
    const std::int64_t sooner = weights_.model().bits == 16 ? 2 : 4;
    return std::min(sooner, decoder_.most_rows());
  }

  void decode(const Step& step, const cuda::CardCache& cache, float* logits) {
    std::vector<cuda::DecodeState> states;
    for (std::size_t row = 0; row < static_cast<std::size_t>(step.batch); ++row) {
      states.push_back({static_cast<int>(step.input_ids[row]), static_cast<int>(step.prev_ids[row]),
                        static_cast<int>(step.position[row])});
    }
    decoder_.set_states(states, stream_.get());
    const int* forced = nullptr;  // the states' tokens
    decoder_.run(1, step.batch, forced, cache.row(0), stream_.get());
    if (step.logits_to_keep.empty()) return;
    const auto bytes = static_cast<std::size_t>(step.batch * weights_.model().vocab) * sizeof(float);
    cuda::check(cudaMemcpyAsync(logits, decoder_.logits(), bytes, cudaMemcpyDeviceToHost, stream_.get()),
                "reading logits");
  }

  cuda::Stream stream_;
  cuda::CardModel weights_;
  cuda::Decoder decoder_;
  cuda::ForwardPass pass_;
  cuda::PinnedPool<float> buffers_;
};

}  // namespace

std::unique_ptr<Backend> open_backend(const Bundle& bundle, const BackendOptions&) {
  check_card();
  return std::make_unique<CudaBackend>(bundle);
}

std::string backend_name() { return "cuda"; }

std::string backend_version() {
  int version = 0;
  (void)cudaRuntimeGetVersion(&version);
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace nanochat_x
