// ONNX: the bundle's programs run on onnxruntime, which maps their weights, a file that all of them share, by itself.

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "guarded.h"
#include "nanochat_x/backend.h"
#include "nanochat_x/error.h"
#include "nanochat_x/host_cache.h"
#include "onnx_library.h"

namespace nanochat_x {
namespace {

using Shape = std::vector<std::int64_t>;

ONNXTensorElementDataType element_type(const std::string& dtype) {
  if (dtype == "float32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  if (dtype == "float16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  throw Error("onnxruntime's runner takes float32 and float16, not " + dtype + "; lower the model again");
}

std::string shape_text(const Shape& shape) {
  std::string text;
  for (const std::int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return '[' + text + ']';
}

// onnxruntime's own words never reach the user's terminal; what went wrong comes as an exception.
void ORT_API_CALL ignore_log(void*, OrtLoggingLevel, const char*, const char*, const char*, const char*) {}

// One environment a process: onnxruntime's thread pools and logger hang on it.
Ort::Env& environment() {
  static Ort::Env env(ORT_LOGGING_LEVEL_FATAL, "nanochat_x", ignore_log, nullptr);
  return env;
}

void use_cuda(Ort::SessionOptions& options) {
  const std::vector<std::string> providers = Ort::GetAvailableProviders();
  if (std::find(providers.begin(), providers.end(), "CUDAExecutionProvider") == providers.end()) {
    throw Error("this onnxruntime (" + backend_version() +
                ") has no CUDA; pip install onnxruntime-gpu in place of onnxruntime, and build the runner again");
  }
  options.AppendExecutionProvider_CUDA(OrtCUDAProviderOptions{});
}

Ort::SessionOptions session_options(const BackendOptions& wanted) {
  Ort::SessionOptions options;
  if (wanted.threads > 0) options.SetIntraOpNumThreads(wanted.threads);
  options.SetGraphOptimizationLevel(GraphOptimizationLevel::ORT_ENABLE_ALL);
  // Matrices are rearranged when the session is made (onnxruntime's default): at d12 that takes a second, makes every
  // step a fifth faster, and the mapped originals are let go, so that each is in memory once all the same.
  if (wanted.device == "cuda") {
    use_cuda(options);
  } else if (wanted.device != "cpu") {
    throw Error("onnxruntime's runner has the devices cpu and cuda, not " + wanted.device);
  }
  return options;
}

// A tensor over memory that somebody else keeps; programs do not write to their inputs.
template <typename Element>
Ort::Value borrow(std::span<Element> data, const Shape& shape, ONNXTensorElementDataType type) {
  static const Ort::MemoryInfo cpu = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU);
  using Plain = std::remove_const_t<Element>;
  return Ort::Value::CreateTensor(cpu, const_cast<Plain*>(data.data()), data.size_bytes(), shape.data(), shape.size(),
                                  type);
}

Ort::Value borrow_ids(std::span<const std::int64_t> ids, const Shape& shape) {
  return borrow(ids, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
}

// Throws Error unless an output is what it must be: its memory is read by these sizes.
void check_output(const Ort::Value& value, const std::string& role, const std::string& name,
                  ONNXTensorElementDataType type, const Shape& shape) {
  const auto info = value.GetTensorTypeAndShapeInfo();
  if (info.GetElementType() != type || info.GetShape() != shape) {
    throw Error("program " + role + " returned " + name + " as " + shape_text(info.GetShape()) + " of type " +
                std::to_string(info.GetElementType()) + " instead of " + shape_text(shape) + " of type " +
                std::to_string(type) + "; lower the model again");
  }
}

// `value` is float32 [B, T, vocab].
Logits to_logits(Ort::Value value) {
  const auto owner = std::make_shared<Ort::Value>(std::move(value));
  const Shape shape = owner->GetTensorTypeAndShapeInfo().GetShape();
  Logits logits;
  logits.batch = shape[0];
  logits.length = shape[1];
  logits.vocab = shape[2];
  logits.data = {owner->GetTensorData<float>(), static_cast<std::size_t>(shape[0] * shape[1] * shape[2])};
  logits.owner = owner;
  return logits;
}

class OnnxBackend final : public Backend {
 public:
  OnnxBackend(const Bundle& bundle, const BackendOptions& options)
      : bundle_(bundle), type_(element_type(bundle.manifest().dtype)), options_(session_options(options)) {
    for (std::int64_t layer = 0; layer < bundle_.manifest().n_layer; ++layer) {
      cache_names_.emplace_back("cache_k_" + std::to_string(layer), "cache_v_" + std::to_string(layer));
    }
    // What nearly every use needs is loaded right after its hash was checked; chatting never loads `full`.
    for (const char* role : {"prefill", "decode"}) {
      if (bundle_.manifest().programs.contains(role)) (void)session(role);
    }
  }

  Logits forward(std::span<const std::int64_t> ids, std::int64_t batch, std::int64_t length) override {
    return guarded("program full failed", [&] {
      const std::array<Ort::Value, 1> inputs = {borrow_ids(ids, {batch, length})};
      auto outputs = run("full", {"input_ids"}, inputs, {"logits"});
      check_logits(outputs[0], "full", batch, length);
      return to_logits(std::move(outputs[0]));
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
  Logits run_cached(const std::string& role, const Step& step, Cache& cache) {
    auto& host = static_cast<HostCache&>(cache);
    const Manifest& m = bundle_.manifest();
    // Nothing is live before the first tokens: an empty cache spares the program from looking at all of it.
    const bool empty = std::all_of(step.position.begin(), step.position.end(), [](auto p) { return p == 0; });
    // One input a layer, since a graph cannot take a layer of one tensor without copying it.
    const Shape shape = {step.batch, m.n_kv_head, empty ? 0 : host.capacity(), m.head_dim};
    std::size_t bytes = element_size();
    for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
    std::vector<const char*> names = {"input_ids", "prev_ids", "position", "logits_to_keep"};
    std::vector<Ort::Value> inputs;
    inputs.push_back(borrow_ids(step.input_ids, {step.batch, step.length}));
    inputs.push_back(borrow_ids(step.prev_ids, {step.batch, 1}));
    inputs.push_back(borrow_ids(step.position, {step.batch}));
    inputs.push_back(borrow_ids(step.logits_to_keep, {std::ssize(step.logits_to_keep)}));
    for (std::size_t layer = 0; layer < cache_names_.size(); ++layer) {
      names.push_back(cache_names_[layer].first.c_str());
      inputs.push_back(borrow(std::span(host.keys() + layer * bytes, bytes), shape, type_));
      names.push_back(cache_names_[layer].second.c_str());
      inputs.push_back(borrow(std::span(host.values() + layer * bytes, bytes), shape, type_));
    }
    auto outputs = run(role, names, inputs, {"logits", "new_k", "new_v"});
    const Shape added = {m.n_layer, step.batch, m.n_kv_head, step.length, m.head_dim};
    check_logits(outputs[0], role, step.batch, std::ssize(step.logits_to_keep));
    check_output(outputs[1], role, "new_k", type_, added);
    check_output(outputs[2], role, "new_v", type_, added);
    host.append(static_cast<const std::byte*>(outputs[1].GetTensorRawData()),
                static_cast<const std::byte*>(outputs[2].GetTensorRawData()), step.position, step.length);
    return to_logits(std::move(outputs[0]));
  }

  std::size_t element_size() const { return type_ == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2; }

  void check_logits(const Ort::Value& value, const std::string& role, std::int64_t batch, std::int64_t length) const {
    check_output(value, role, "logits", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                 {batch, length, bundle_.manifest().vocab_size});
  }

  std::vector<Ort::Value> run(const std::string& role, const std::vector<const char*>& input_names,
                              std::span<const Ort::Value> inputs, const std::vector<const char*>& output_names) {
    return session(role).Run(Ort::RunOptions(), input_names.data(), inputs.data(), inputs.size(), output_names.data(),
                             output_names.size());
  }

  // Loaded when it is first asked for; the file may have changed since all were checked. Roles may share a file.
  Ort::Session& session(const std::string& role) {
    const auto& paths = bundle_.manifest().programs;
    const auto path = paths.find(role);
    if (path == paths.end()) throw Error("the bundle has no program " + role + "; lower the model again");
    auto& slot = sessions_[path->second];
    if (!slot) {
      bundle_.verify_hash(path->second);
      slot = std::make_unique<Ort::Session>(environment(), bundle_.path_of(path->second).c_str(), options_);
    }
    return *slot;
  }

  Bundle bundle_;
  ONNXTensorElementDataType type_;
  Ort::SessionOptions options_;
  std::vector<std::pair<std::string, std::string>> cache_names_;   // inputs of the cached graph: keys, values, by layer
  std::map<std::string, std::unique_ptr<Ort::Session>> sessions_;  // by the path of the file
};

}  // namespace

std::unique_ptr<Backend> open_backend(const Bundle& bundle, const BackendOptions& options) {
  use_onnxruntime();
  return guarded("cannot open the bundle's programs", [&] { return std::make_unique<OnnxBackend>(bundle, options); });
}

std::string backend_name() { return "onnx"; }

std::string backend_version() { return onnxruntime_base().GetVersionString(); }

}  // namespace nanochat_x
