// AOTInductor: the bundle's programs are shared objects, run on libtorch; they share one memory-mapped set of weights.

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>
#include <torch/version.h>

#include <algorithm>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "nanochat_x/backend.h"
#include "nanochat_x/error.h"
#include "nanochat_x/host_cache.h"
#include "nanochat_x/safetensors.h"

namespace nanochat_x {
namespace {

using Runner = torch::inductor::AOTIModelContainerRunnerCpu;

at::ScalarType scalar_type(const std::string& dtype) {
  static const std::map<std::string, at::ScalarType> types = {
      {"F32", at::kFloat},     {"BF16", at::kBFloat16},     {"F16", at::kHalf},
      {"float32", at::kFloat}, {"bfloat16", at::kBFloat16}, {"float16", at::kHalf},
  };
  const auto found = types.find(dtype);
  if (found == types.end())
    throw Error("tensor type " + dtype + " is none that this runner knows; lower the model again");
  return found->second;
}

// A tensor over memory that somebody else keeps. The programs never write to their inputs or weights.
at::Tensor borrow(const void* data, const std::vector<std::int64_t>& shape, at::ScalarType type) {
  return at::from_blob(const_cast<void*>(data), shape, at::TensorOptions(type));
}

std::string first_line(const char* text) {
  const std::string whole(text);
  return whole.substr(0, whole.find('\n'));
}

// Runs libtorch code; its exceptions become ours.
template <typename Function>
auto guarded(const std::string& what, Function&& function) {
  try {
    return function();
  } catch (const Error&) {
    throw;
  } catch (const c10::Error& error) {
    throw Error(what + ": " + first_line(error.what_without_backtrace()));
  } catch (const std::exception& error) {
    throw Error(what + ": " + first_line(error.what()));
  }
}

Logits to_logits(at::Tensor tensor) {
  tensor = tensor.contiguous();
  Logits logits;
  logits.batch = tensor.size(0);
  logits.length = tensor.size(1);
  logits.vocab = tensor.size(2);
  logits.data = {tensor.const_data_ptr<float>(), static_cast<std::size_t>(tensor.numel())};
  logits.owner = std::make_shared<const at::Tensor>(std::move(tensor));
  return logits;
}

class AotiBackend final : public Backend {
 public:
  AotiBackend(const Bundle& bundle, int threads)
      : bundle_(bundle), weights_(SafetensorsFile::open(bundle.path_of(bundle.manifest().weights))) {
    if (threads > 0) at::set_num_threads(threads);
  }

  Logits forward(std::span<const std::int64_t> ids, std::int64_t batch, std::int64_t length) override {
    auto outputs = run("full", {borrow(ids.data(), {batch, length}, at::kLong)}, 1);
    return to_logits(std::move(outputs[0]));
  }

  Logits step(const Step& step, Cache& cache) override {
    auto& host = static_cast<HostCache&>(cache);
    const Manifest& m = bundle_.manifest();
    // Nothing is live before the first tokens: an empty cache spares the program from looking at all of it.
    const bool empty = std::all_of(step.position.begin(), step.position.end(), [](auto p) { return p == 0; });
    const std::vector<std::int64_t> shape = {m.n_layer, step.batch, m.n_kv_head, empty ? 0 : host.capacity(),
                                             m.head_dim};
    const at::ScalarType type = scalar_type(m.dtype);
    auto outputs = run(step.length == 1 ? "decode" : "prefill",
                       {borrow(step.input_ids.data(), {step.batch, step.length}, at::kLong),
                        borrow(step.prev_ids.data(), {step.batch, 1}, at::kLong), borrow(host.keys(), shape, type),
                        borrow(host.values(), shape, type), borrow(step.position.data(), {step.batch}, at::kLong)},
                       3);
    const at::Tensor keys = outputs[1].contiguous(), values = outputs[2].contiguous();
    host.append(static_cast<const std::byte*>(keys.const_data_ptr()),
                static_cast<const std::byte*>(values.const_data_ptr()), step.position, step.length);
    return to_logits(std::move(outputs[0]));
  }

  std::unique_ptr<Cache> new_cache(std::int64_t rows, std::int64_t capacity) override {
    return std::make_unique<HostCache>(bundle_.manifest(), rows, capacity);
  }

 private:
  std::vector<at::Tensor> run(const std::string& role, const std::vector<at::Tensor>& inputs, std::size_t expected) {
    return guarded("program " + role + " failed", [&] {
      auto outputs = program(role).run(inputs);
      if (outputs.size() != expected) {
        throw Error("program " + role + " returned " + std::to_string(outputs.size()) + " tensors instead of " +
                    std::to_string(expected) + "; lower the model again");
      }
      return outputs;
    });
  }

  // A program is loaded when it is first needed: chatting never loads `full`.
  Runner& program(const std::string& role) {
    auto& slot = programs_[role];
    if (!slot) {
      const auto& paths = bundle_.manifest().programs;
      const auto path = paths.find(role);
      if (path == paths.end()) throw Error("the bundle has no program " + role + "; lower the model again");
      slot = std::make_unique<Runner>(bundle_.path_of(path->second).string());
      give_weights(*slot);
    }
    return *slot;
  }

  // Programs are compiled without constants; each constant is known by its original name, that of its tensor in the
  // file.
  void give_weights(Runner& runner) {
    std::unordered_map<std::string, at::Tensor> constants;
    for (const auto& [name, original] : runner.getConstantNamesToOriginalFQNs()) {
      const TensorView& view = weights_.at(original);
      constants.emplace(name, borrow(view.data.data(), view.shape, scalar_type(view.dtype)));
    }
    runner.update_constant_buffer(constants, /*use_inactive=*/false, /*validate_full_updates=*/true,
                                  /*user_managed=*/true);
  }

  Bundle bundle_;
  SafetensorsFile weights_;
  std::map<std::string, std::unique_ptr<Runner>> programs_;
};

}  // namespace

std::unique_ptr<Backend> open_backend(const Bundle& bundle, int threads) {
  return guarded("cannot open the bundle's programs", [&] { return std::make_unique<AotiBackend>(bundle, threads); });
}

std::string backend_name() { return "aoti"; }

std::string backend_version() { return TORCH_VERSION; }

}  // namespace nanochat_x
