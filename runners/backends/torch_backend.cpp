#include "torch_backend.h"

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <map>
#include <utility>

#include "guarded.h"
#include "nanochat_x/error.h"
#include "nanochat_x/host_cache.h"
#include "operators.h"

namespace nanochat_x {
namespace {

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

}  // namespace

at::ScalarType scalar_type(const std::string& dtype) {
  static const std::map<std::string, at::ScalarType> types = {
      {"F32", at::kFloat},         {"BF16", at::kBFloat16}, {"F16", at::kHalf},
      {"I32", at::kInt},           {"I8", at::kChar},       {"float32", at::kFloat},
      {"bfloat16", at::kBFloat16}, {"float16", at::kHalf},  {"U8", at::kByte},
  };
  const auto found = types.find(dtype);
  if (found == types.end())
    throw Error("tensor type " + dtype + " is none that this runner knows; lower the model again");
  return found->second;
}

at::Tensor borrow(const void* data, const std::vector<std::int64_t>& shape, at::ScalarType type) {
  return at::from_blob(const_cast<void*>(data), shape, at::TensorOptions(type));
}

std::string shape_text(at::IntArrayRef shape) {
  std::string text;
  for (const std::int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return '[' + text + ']';
}

TorchBackend::TorchBackend(const Bundle& bundle, const BackendOptions& options) : bundle_(bundle) {
  if (options.device != "cpu") {
    throw Error("the programs of '" + bundle.folder().string() + "' are lowered for the CPU, not for the device '" +
                options.device + "'; leave out --device");
  }
  bundle.check_operators(operators::names());
  if (options.threads > 0) at::set_num_threads(options.threads);  // of the whole process: libtorch has one pool
}

Logits TorchBackend::forward(std::span<const std::int64_t> ids, std::int64_t batch, std::int64_t length) {
  return guarded("program full failed", [&] {
    const auto outputs = run("full", {borrow(ids.data(), {batch, length}, at::kLong)}, 1);
    return to_logits(checked_logits(outputs[0], "full", batch, length));
  });
}

Logits TorchBackend::step(const Step& step, Cache& cache) {
  const std::string role = step.length == 1 ? "decode" : "prefill";
  return guarded("program " + role + " failed", [&] { return run_cached(role, step, cache); });
}

std::unique_ptr<Cache> TorchBackend::new_cache(std::int64_t rows, std::int64_t capacity) {
  return std::make_unique<HostCache>(bundle_.manifest(), rows, capacity);
}

const std::string& TorchBackend::file_of(const std::string& role) const {
  const auto& paths = bundle_.manifest().programs;
  const auto path = paths.find(role);
  if (path == paths.end()) throw Error("the bundle has no program " + role + "; lower the model again");
  return path->second;
}

Logits TorchBackend::run_cached(const std::string& role, const Step& step, Cache& cache) {
  auto& host = static_cast<HostCache&>(cache);
  const Manifest& m = bundle_.manifest();
  // Nothing is live before the first tokens: an empty cache spares the program from looking at all of it.
  const bool empty = std::all_of(step.position.begin(), step.position.end(), [](auto p) { return p == 0; });
  const std::vector<std::int64_t> shape = {m.n_layer, step.batch, m.n_kv_head, empty ? 0 : host.capacity(), m.head_dim};
  const at::ScalarType type = scalar_type(m.dtype);
  const auto outputs = run(role,
                           {borrow(step.input_ids.data(), {step.batch, step.length}, at::kLong),
                            borrow(step.prev_ids.data(), {step.batch, 1}, at::kLong), borrow(host.keys(), shape, type),
                            borrow(host.values(), shape, type), borrow(step.position.data(), {step.batch}, at::kLong),
                            borrow(step.logits_to_keep.data(), {std::ssize(step.logits_to_keep)}, at::kLong)},
                           3);
  const std::vector<std::int64_t> added = {m.n_layer, step.batch, m.n_kv_head, step.length, m.head_dim};
  at::Tensor logits = checked_logits(outputs[0], role, step.batch, std::ssize(step.logits_to_keep));
  const at::Tensor keys = checked(outputs[1], role, "new_k", type, added);
  const at::Tensor values = checked(outputs[2], role, "new_v", type, added);
  host.append(static_cast<const std::byte*>(keys.const_data_ptr()),
              static_cast<const std::byte*>(values.const_data_ptr()), step.position, step.length);
  return to_logits(std::move(logits));
}

std::vector<at::Tensor> TorchBackend::run(const std::string& role, const std::vector<at::Tensor>& inputs,
                                          std::size_t expected) {
  auto outputs = call(role, inputs);
  if (outputs.size() != expected) {
    throw Error("program " + role + " returned " + std::to_string(outputs.size()) + " tensors instead of " +
                std::to_string(expected) + "; lower the model again");
  }
  return outputs;
}

at::Tensor TorchBackend::checked_logits(const at::Tensor& tensor, const std::string& role, std::int64_t batch,
                                        std::int64_t length) const {
  return checked(tensor, role, "logits", at::kFloat, {batch, length, bundle_.manifest().vocab_size});
}

}  // namespace nanochat_x
