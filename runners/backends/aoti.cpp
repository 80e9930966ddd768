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

std::string shape_text(at::IntArrayRef shape) {
  std::string text;
  for (const std::int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return '[' + text + ']';
}

// An output of a program as it must be, contiguous; Error if it is another tensor: its memory is read by these sizes.
at::Tensor checked(const at::Tensor& tensor, const std::string& role, const char* name, at::ScalarType type,
                   at::IntArrayRef shape) {
  if (tensor.scalar_type() != type || tensor.sizes() != shape || !tensor.device().is_cpu()) {
    throw Error("program " + role + " returned " + name + " as " + c10::toString(tensor.scalar_type()) +
                shape_text(tensor.sizes()) + " instead of " + c10::toString(type) + shape_text(shape) +
                "; lower the model again");
  }
  return tensor.contiguous();
}

// `tensor` is contiguous float32 [B, T, vocab].
Logits to_logits(at::Tensor tensor) {
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
  AotiBackend(const Bundle& bundle, const BackendOptions& options)
      : bundle_(bundle), weights_(SafetensorsFile::open(bundle.path_of(bundle.manifest().weights))) {
    check_rows("cos", bundle_.manifest().max_seq_len, "max_seq_len");
    check_rows("model.lm_head.weight", bundle_.manifest().vocab_size, "vocab_size");
    if (options.threads > 0) at::set_num_threads(options.threads);  // of the whole process: libtorch has one pool
    // What nearly every use needs is loaded right after its hash was checked; chatting never loads `full`.
    for (const char* role : {"prefill", "decode"}) {
      if (bundle_.manifest().is_cached()) (void)program(role);
    }
  }

  Logits forward(std::span<const std::int64_t> ids, std::int64_t batch, std::int64_t length) override {
    return guarded("program full failed", [&] {
      const auto outputs = run("full", {borrow(ids.data(), {batch, length}, at::kLong)}, 1);
      return to_logits(checked_logits(outputs[0], "full", batch, length));
    });
  }

  Logits step(const Step& step, Cache& cache) override {
    const std::string role = step.length == 1 ? "decode" : "prefill";
    return guarded("program " + role + " failed", [&] { return run_cached(role, step, cache); });
  }

  std::unique_ptr<Cache> new_cache(std::int64_t rows, std::int64_t capacity) override {
    return std::make_unique<HostCache>(bundle_.manifest(), rows, capacity);
  }

 private:
  // The programs read that many rows, whatever the file holds.
  void check_rows(const std::string& name, std::int64_t rows, const std::string& what) const {
    const auto found = weights_.tensors().find(name);
    if (found == weights_.tensors().end()) return;  // these programs know it by another name
    const auto& shape = found->second.shape;
    if (shape.empty() || shape[0] != rows) {
      throw Error("the weights' tensor " + name + " has shape " + shape_text(shape) + ", but the manifest's " + what +
                  " is " + std::to_string(rows) + "; lower the model again");
    }
  }

  Logits run_cached(const std::string& role, const Step& step, Cache& cache) {
    auto& host = static_cast<HostCache&>(cache);
    const Manifest& m = bundle_.manifest();
    // Nothing is live before the first tokens: an empty cache spares the program from looking at all of it.
    const bool empty = std::all_of(step.position.begin(), step.position.end(), [](auto p) { return p == 0; });
    const std::vector<std::int64_t> shape = {m.n_layer, step.batch, m.n_kv_head, empty ? 0 : host.capacity(),
                                             m.head_dim};
    const at::ScalarType type = scalar_type(m.dtype);
    const auto outputs =
        run(role,
            {borrow(step.input_ids.data(), {step.batch, step.length}, at::kLong),
             borrow(step.prev_ids.data(), {step.batch, 1}, at::kLong), borrow(host.keys(), shape, type),
             borrow(host.values(), shape, type), borrow(step.position.data(), {step.batch}, at::kLong)},
            3);
    const std::vector<std::int64_t> added = {m.n_layer, step.batch, m.n_kv_head, step.length, m.head_dim};
    at::Tensor logits = checked_logits(outputs[0], role, step.batch, step.length);
    const at::Tensor keys = checked(outputs[1], role, "new_k", type, added);
    const at::Tensor values = checked(outputs[2], role, "new_v", type, added);
    host.append(static_cast<const std::byte*>(keys.const_data_ptr()),
                static_cast<const std::byte*>(values.const_data_ptr()), step.position, step.length);
    return to_logits(std::move(logits));
  }

  at::Tensor checked_logits(const at::Tensor& tensor, const std::string& role, std::int64_t batch,
                            std::int64_t length) const {
    return checked(tensor, role, "logits", at::kFloat, {batch, length, bundle_.manifest().vocab_size});
  }

  std::vector<at::Tensor> run(const std::string& role, const std::vector<at::Tensor>& inputs, std::size_t expected) {
    auto outputs = program(role).run(inputs);
    if (outputs.size() != expected) {
      throw Error("program " + role + " returned " + std::to_string(outputs.size()) + " tensors instead of " +
                  std::to_string(expected) + "; lower the model again");
    }
    return outputs;
  }

  // Loaded when it is first asked for. The files may have changed since all were checked, and loading runs code.
  Runner& program(const std::string& role) {
    auto& slot = programs_[role];
    if (!slot) {
      const auto& paths = bundle_.manifest().programs;
      const auto path = paths.find(role);
      if (path == paths.end()) throw Error("the bundle has no program " + role + "; lower the model again");
      bundle_.verify_hash(path->second);
      auto runner = std::make_unique<Runner>(bundle_.path_of(path->second).string());
      give_weights(*runner);
      slot = std::move(runner);  // not before: one without weights must never run
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

std::unique_ptr<Backend> open_backend(const Bundle& bundle, const BackendOptions& options) {
  if (options.device != "cpu") {
    throw Error("the programs of '" + bundle.folder().string() + "' are compiled for the CPU, not for the device '" +
                options.device + "'; leave out --device");
  }
  return guarded("cannot open the bundle's programs", [&] { return std::make_unique<AotiBackend>(bundle, options); });
}

std::string backend_name() { return "aoti"; }

std::string backend_version() { return TORCH_VERSION; }

}  // namespace nanochat_x
