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
#include "nanochat_x/backend.h"
#include "nanochat_x/error.h"
#include "pinned_memory.h"

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
  explicit CudaBackend(const Bundle& bundle)
      : weights_(bundle),
        decoder_(weights_.model()),
        max_seq_len_(bundle.manifest().max_seq_len),
        forced_(static_cast<std::size_t>(max_seq_len_)) {}

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

  // Rows one after the other, each token by token: there is no faster way for a prompt or a batch yet.
  Logits step(const Step& step, Cache& cache) override {
    const auto& on_card = static_cast<const cuda::CardCache&>(cache);
    const auto kept = std::ssize(step.logits_to_keep);
    const std::int64_t vocab = weights_.model().vocab;
    auto logits =
        std::make_shared<cuda::PinnedArray<float>>(buffers_.take(static_cast<std::size_t>(step.batch * kept * vocab)));
    for (std::int64_t row = 0; row < step.batch; ++row)
      run_row(step, row, on_card, logits->data() + row * kept * vocab);
    cuda::check(cudaStreamSynchronize(nullptr), "decoding");
    return {{logits->data(), static_cast<std::size_t>(step.batch * kept * vocab)}, step.batch, kept, vocab, logits};
  }

  std::unique_ptr<Cache> new_cache(std::int64_t rows, std::int64_t capacity) override {
    const auto& model = weights_.model();
    return std::make_unique<cuda::CardCache>(std::ssize(model.layers), model.n_kv_head, rows, capacity);
  }

 private:
  void run_row(const Step& step, std::int64_t row, const cuda::CardCache& cache, float* logits) {
    const auto ids =
        step.input_ids.subspan(static_cast<std::size_t>(row * step.length), static_cast<std::size_t>(step.length));
    const std::vector<int> narrow(ids.begin(), ids.end());
    cuda::check(
        cudaMemcpyAsync(forced_.data(), narrow.data(), narrow.size() * sizeof(int), cudaMemcpyHostToDevice, nullptr),
        "copying token ids");
    const auto at = static_cast<std::size_t>(row);
    decoder_.set_state(narrow[0], static_cast<int>(step.prev_ids[at]), static_cast<int>(step.position[at]), nullptr);
    std::int64_t done = 0;
    const auto run_to = [&](std::int64_t end) {
      while (done < end) {
        const std::int64_t steps = std::min(end - done, cuda::Decoder::kMostSteps);
        decoder_.run(steps, forced_.data() + done, cache.row(row), nullptr);
        done += steps;
      }
    };
    for (const std::int64_t column : step.logits_to_keep) {
      run_to(column + 1);
      const auto bytes = static_cast<std::size_t>(weights_.model().vocab) * sizeof(float);
      cuda::check(cudaMemcpyAsync(logits, decoder_.logits(), bytes, cudaMemcpyDeviceToHost, nullptr), "reading logits");
      logits += weights_.model().vocab;
    }
    run_to(step.length);
  }

  cuda::CardModel weights_;
  cuda::Decoder decoder_;
  std::int64_t max_seq_len_;
  cuda::DeviceArray<int> forced_;
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
