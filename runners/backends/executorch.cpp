// ExecuTorch: the bundle's programs are methods of one .pte, run by the SDK that the executorch wheel holds.
//
// The file is memory-mapped; own operators and lookups read weights where they lie, XNNPACK packs matrices once for all
// methods. Inputs and outputs are memory of ours: the cache is handed over as it is, logits are written to where they
// are returned from.

#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/extension/tensor/tensor_ptr_maker.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "executorch_operators.h"
#include "executorch_threads.h"
#include "nanochat_x/backend.h"
#include "nanochat_x/error.h"
#include "nanochat_x/host_cache.h"

// The SDK has the library of its thread pool, but not the header: what is declared here is in the library.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t num_threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace nanochat_x {
namespace {

namespace et = executorch::runtime;
namespace ext = executorch::extension;
using executorch::aten::ScalarType;
using executorch::aten::SizesType;

constexpr char kXnnpack[] = "XnnpackBackend";
constexpr int kOneWorkspace = 2;  // XNNPACK's scratch memory: one for all methods, which never run at once

/// What the runtime wanted to print last, for the message of the Error that follows.
class LastWords {
 public:
  void set(const char* text, std::size_t length) {
    const std::scoped_lock lock(mutex_);
    text_.assign(text, length);
  }
  std::string take() {
    const std::scoped_lock lock(mutex_);
    return std::exchange(text_, {});
  }

 private:
  std::mutex mutex_;
  std::string text_;
};

LastWords& last_words() {
  static LastWords words;
  return words;
}

void keep_message(et_timestamp_t /*when*/, et_pal_log_level_t level, const char* /*file*/, const char* /*function*/,
                  std::size_t /*line*/, const char* message, std::size_t length) {
  if (level == kError || level == kFatal) last_words().set(message, length);
}

[[noreturn]] void throw_instead() { throw Error("ExecuTorch gave up: " + last_words().take()); }

void start_runtime() {
  static std::once_flag once;
  std::call_once(once, [] {
    // Before anything of the runtime runs: a library neither prints nor aborts.
    et::register_pal(et::PalImpl::create(nullptr, throw_instead, nullptr, nullptr, keep_message, nullptr, nullptr,
                                         "nanochat_x/executorch.cpp"));
    et::runtime_init();
    executorch_operators::add_to_registry();
  });
}

void check(et::Error error, const std::string& what) {
  if (error == et::Error::Ok) return;
  const std::string words = last_words().take();
  throw Error(what + ": " + (words.empty() ? std::string(et::to_string(error)) : words));
}

template <typename T>
T checked(et::Result<T> result, const std::string& what) {
  check(result.error(), what);
  return std::move(result.get());
}

ScalarType scalar_type(const std::string& dtype) {
  if (dtype == "float32") return ScalarType::Float;
  if (dtype == "float16") return ScalarType::Half;
  throw Error("the ExecuTorch runner computes in float32 and float16, not in " + dtype);
}

template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text;
  for (const auto size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return '[' + text + ']';
}

struct Free {
  void operator()(std::uint8_t* p) const { std::free(p); }
};

/// Memory that costs nothing until it is written to: a method is planned for its upper bounds, which few calls reach.
std::unique_ptr<std::uint8_t, Free> untouched(std::size_t bytes) {
  std::unique_ptr<std::uint8_t, Free> memory(
      static_cast<std::uint8_t*>(std::calloc(std::max<std::size_t>(bytes, 1), 1)));
  if (!memory) throw Error("no memory for a program's " + std::to_string(bytes >> 20) + " MiB of intermediate results");
  return memory;
}

/// A loaded method and the memory it works in.
class LoadedMethod {
 public:
  LoadedMethod(const et::Program& program, const std::string& name) : name_(name) {
    const auto meta = checked(program.method_meta(name.c_str()), "the .pte has no method " + name);
    for (std::size_t i = 0; i < meta.num_memory_planned_buffers(); ++i) {
      const auto size = static_cast<std::size_t>(checked(meta.memory_planned_buffer_size(i), "method " + name));
      buffers_.push_back(untouched(size));
      spans_.emplace_back(buffers_.back().get(), size);
    }
    planned_.emplace(et::Span<et::Span<std::uint8_t>>(spans_.data(), spans_.size()));
    memory_.emplace(&method_allocator_, &*planned_, &temp_allocator_);
    method_.emplace(checked(program.load_method(name.c_str(), &*memory_), "cannot load method " + name));
  }
  LoadedMethod(const LoadedMethod&) = delete;
  LoadedMethod& operator=(const LoadedMethod&) = delete;

  /// An output of the method: where it is to be written, and what it must be.
  struct Output {
    void* data;
    ScalarType type;
    std::vector<std::int64_t> shape;
  };

  /// Throws Error if the method does not take and return tensors of these types and shapes; a size of -1 may be any.
  void check_signature(const std::vector<std::vector<std::int64_t>>& inputs,
                       const std::vector<std::vector<std::int64_t>>& outputs) const {
    const auto meta = method_->method_meta();
    const auto compare = [&](const auto& wanted, std::size_t count, const char* kind, const auto& info_of) {
      bool same = count == wanted.size();
      for (std::size_t i = 0; same && i < count; ++i) {
        const auto info = checked(info_of(i), "method " + name_);
        const auto sizes = info.sizes();
        same = sizes.size() == wanted[i].size() &&
               std::equal(sizes.begin(), sizes.end(), wanted[i].begin(),
                          [](auto size, std::int64_t want) { return want < 0 ? size >= -want : size == want; });
      }
      if (!same)
        throw Error("method " + name_ + " has other " + kind + "s than the manifest says; lower the model again");
    };
    compare(inputs, meta.num_inputs(), "input", [&](std::size_t i) { return meta.input_tensor_meta(i); });
    compare(outputs, meta.num_outputs(), "output", [&](std::size_t i) { return meta.output_tensor_meta(i); });
  }

  void run(const std::vector<ext::TensorPtr>& inputs, const std::vector<Output>& outputs) {
    const std::string failed = "program " + name_ + " failed";
    for (std::size_t i = 0; i < inputs.size(); ++i) check(method_->set_input(*inputs[i], i), failed);
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      // The size is only compared with what the last call returned, or with the bounds before the first.
      check(method_->set_output_data_ptr(outputs[i].data, std::numeric_limits<std::size_t>::max(), i), failed);
    }
    const et::Error error = method_->execute();
    if (const std::string why = executorch_operators::take_error(); !why.empty()) throw Error(failed + ": " + why);
    check(error, failed);
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      const auto& tensor = method_->get_output(i).toTensor();
      const auto& wanted = outputs[i];
      if (tensor.scalar_type() != wanted.type || !std::ranges::equal(tensor.sizes(), wanted.shape) ||
          tensor.const_data_ptr() != wanted.data) {
        throw Error("program " + name_ + " returned output " + std::to_string(i) + " of shape " +
                    shape_text(tensor.sizes()) + " instead of " + shape_text(wanted.shape) + "; lower the model again");
      }
    }
  }

 private:
  std::string name_;
  ext::MallocMemoryAllocator method_allocator_, temp_allocator_;
  std::vector<std::unique_ptr<std::uint8_t, Free>> buffers_;
  std::vector<et::Span<std::uint8_t>> spans_;
  std::optional<et::HierarchicalAllocator> planned_;
  std::optional<et::MemoryManager> memory_;
  std::optional<et::Method> method_;
};

ext::TensorPtr borrow(const void* data, const std::vector<std::int64_t>& shape, ScalarType type) {
  std::vector<SizesType> sizes;
  for (const std::int64_t size : shape) sizes.push_back(static_cast<SizesType>(size));
  // The programs never write to their inputs.
  return ext::from_blob(const_cast<void*>(data), std::move(sizes), type);
}

/// Logits `[batch, length, vocab]` that the programs fill in place, piece by piece.
Logits new_logits(std::int64_t batch, std::int64_t length, std::int64_t vocab, float*& data) {
  const auto count = static_cast<std::size_t>(batch * length * vocab);
  std::shared_ptr<float[]> owner = std::make_shared_for_overwrite<float[]>(count);
  data = owner.get();
  return {.data = {data, count}, .batch = batch, .length = length, .vocab = vocab, .owner = std::move(owner)};
}

class ExecuTorchBackend final : public Backend {
 public:
  ExecuTorchBackend(const Bundle& bundle, int threads) : bundle_(bundle), type_(scalar_type(bundle.manifest().dtype)) {
    start_runtime();
    const Manifest& m = bundle_.manifest();
    bundle_.check_operators(executorch_operators::names());
    for (const auto& [role, path] : m.programs) {
      if (path != m.programs.begin()->second) throw Error("an ExecuTorch bundle has one .pte; lower the model again");
    }
    max_batch_ = limit("batch");
    max_steps_ = std::min(limit("steps"), m.max_seq_len);
    set_threads(threads);
    set_options();
    // The file may have changed since all were checked.
    const std::string& file = m.programs.begin()->second;
    bundle_.verify_hash(file);
    const std::string where = "cannot read " + file;
    loader_.emplace(checked(
        ext::MmapDataLoader::from(bundle_.path_of(file).string().c_str(), ext::MmapDataLoader::MlockConfig::NoMlock),
        where));
    program_.emplace(checked(et::Program::load(&*loader_, et::Program::Verification::Minimal), where));
    // What nearly every use needs; chatting never loads `full`.
    for (const char* role : {"prefill", "decode"}) {
      if (m.programs.contains(role)) (void)method(role);
    }
  }

  Logits forward(std::span<const std::int64_t> ids, std::int64_t batch, std::int64_t length) override {
    const std::int64_t vocab = bundle_.manifest().vocab_size;
    float* data = nullptr;
    Logits logits = new_logits(batch, length, vocab, data);
    for (std::int64_t b = 0; b < batch; ++b) {
      method("full").run({borrow(ids.data() + b * length, {1, length}, ScalarType::Long)},
                         {{data + b * length * vocab, ScalarType::Float, {1, length, vocab}}});
    }
    return logits;
  }

  Logits step(const Step& step, Cache& cache) override {
    auto& host = static_cast<HostCache&>(cache);
    float* data = nullptr;
    Logits logits = new_logits(step.batch, std::ssize(step.logits_to_keep), bundle_.manifest().vocab_size, data);
    if (step.length == 1) {
      for (std::int64_t b = 0; b < step.batch; b += max_batch_) {
        const Part part{
            .first_row = b, .rows = std::min(max_batch_, step.batch - b), .begin = 0, .steps = 1, .kept = {0}};
        run_part("decode", step, part, host, data + b * logits.vocab);
      }
      return logits;
    }
    std::vector<float> unwanted(static_cast<std::size_t>(logits.vocab));
    for (std::int64_t b = 0; b < step.batch; ++b) {
      for (std::int64_t t = 0; t < step.length; t += max_steps_) {
        Part part{.first_row = b, .rows = 1, .begin = t, .steps = std::min(max_steps_, step.length - t), .kept = {}};
        for (const std::int64_t column : step.logits_to_keep) {
          if (column >= t && column < t + part.steps) part.kept.push_back(column - t);
        }
        const auto kept = std::ssize(part.kept);
        if (kept == 0) part.kept.push_back(0);  // a program computes one at least
        run_part("prefill", step, part, host, kept > 0 ? data : unwanted.data());
        data += kept * logits.vocab;
      }
    }
    return logits;
  }

  std::unique_ptr<Cache> new_cache(std::int64_t rows, std::int64_t capacity) override {
    return std::make_unique<HostCache>(bundle_.manifest(), rows, capacity);
  }

 private:
  /// What one call computes of a step: consecutive rows, of each the tokens begin to begin + steps, and logits of those
  /// that `kept` counts from `begin` on.
  struct Part {
    std::int64_t first_row, rows, begin, steps;
    std::vector<std::int64_t> kept;
  };

  std::int64_t limit(const std::string& name) const {
    const auto found = bundle_.manifest().limits.find(name);
    if (found == bundle_.manifest().limits.end()) {
      throw Error("the manifest has no limits." + name + ", which an ExecuTorch bundle needs; lower the model again");
    }
    return found->second;
  }

  static void set_threads(int threads) {
    if (threads <= 0) return;
    executorch_operators::set_threads(threads);
    auto* pool = ext::threadpool::get_threadpool();  // of the whole process
    if (pool == nullptr || !pool->_unsafe_reset_threadpool(static_cast<std::uint32_t>(threads))) {
      throw Error("ExecuTorch's thread pool cannot be made " + std::to_string(threads) + " threads large");
    }
  }

  static void set_options() {
    et::BackendOptions<2> options;
    check(options.set_option("weight_cache_enabled", true), "XNNPACK's options");
    check(options.set_option("workspace_sharing_mode", kOneWorkspace), "XNNPACK's options");
    check(et::set_option(kXnnpack, options.view()), "XNNPACK's options");
  }

  void run_part(const char* role, const Step& step, const Part& part, HostCache& cache, float* logits) {
    const Manifest& m = bundle_.manifest();
    const auto first = static_cast<std::size_t>(part.first_row), rows = static_cast<std::size_t>(part.rows);
    const std::int64_t* ids = step.input_ids.data() + part.first_row * step.length + part.begin;
    const std::int64_t* previous = part.begin > 0 ? ids - 1 : step.prev_ids.data() + part.first_row;
    std::vector<std::int64_t> position(rows);
    for (std::size_t i = 0; i < rows; ++i) position[i] = step.position[first + i] + part.begin;

    std::vector<ext::TensorPtr> inputs = {borrow(ids, {part.rows, part.steps}, ScalarType::Long),
                                          borrow(previous, {part.rows, 1}, ScalarType::Long),
                                          borrow(position.data(), {part.rows}, ScalarType::Long),
                                          borrow(part.kept.data(), {std::ssize(part.kept)}, ScalarType::Long)};
    add_cache(inputs, part, position, cache);
    const std::vector<std::int64_t> added = {m.n_layer, part.rows, m.n_kv_head, part.steps, m.head_dim};
    const auto bytes = static_cast<std::size_t>(m.n_layer * part.rows * m.n_kv_head * part.steps * m.head_dim) *
                       (type_ == ScalarType::Float ? 4 : 2);
    new_keys_.resize(std::max(new_keys_.size(), bytes));
    new_values_.resize(std::max(new_values_.size(), bytes));
    method(role).run(inputs, {{logits, ScalarType::Float, {part.rows, std::ssize(part.kept), m.vocab_size}},
                              {new_keys_.data(), type_, added},
                              {new_values_.data(), type_, added}});
    cache.append_rows(new_keys_.data(), new_values_.data(), part.first_row, position, part.steps);
  }

  /// One tensor [rows, H_kv, S, D] a layer for keys and one for values, where they lie in the cache.
  void add_cache(std::vector<ext::TensorPtr>& inputs, const Part& part, const std::vector<std::int64_t>& position,
                 HostCache& cache) const {
    const Manifest& m = bundle_.manifest();
    // Nothing is live before the first tokens: one dead slot spares the program from looking at all of the cache.
    const bool empty = std::ranges::all_of(position, [](std::int64_t p) { return p == 0; });
    const std::vector<std::int64_t> shape = {part.rows, m.n_kv_head, empty ? 1 : cache.capacity(), m.head_dim};
    const std::int64_t row_bytes = m.n_kv_head * cache.capacity() * m.head_dim * (type_ == ScalarType::Float ? 4 : 2);
    for (std::int64_t layer = 0; layer < m.n_layer; ++layer) {
      const std::int64_t offset = (layer * cache.rows() + part.first_row) * row_bytes;
      inputs.push_back(borrow(cache.keys() + offset, shape, type_));
      inputs.push_back(borrow(cache.values() + offset, shape, type_));
    }
  }

  LoadedMethod& method(const std::string& role) {
    auto& slot = methods_[role];
    if (!slot) {
      if (!bundle_.manifest().programs.contains(role))
        throw Error("the bundle has no program " + role + "; lower the model again");
      auto loaded = std::make_unique<LoadedMethod>(*program_, role);
      check_signature(role, *loaded);
      slot = std::move(loaded);
    }
    return *slot;
  }

  /// The programs read and write memory by these sizes: a manifest that says others must not get further.
  void check_signature(const std::string& role, const LoadedMethod& loaded) const {
    const Manifest& m = bundle_.manifest();
    const std::int64_t rows = role == "decode" ? -max_batch_ : 1;
    const std::int64_t steps = role == "full" ? -m.max_seq_len : role == "decode" ? 1 : -max_steps_;
    const std::vector<std::int64_t> logits = {rows, steps, m.vocab_size};
    if (role == "full") return loaded.check_signature({{1, steps}}, {logits});
    const std::vector<std::int64_t> layer = {rows, m.n_kv_head, -m.max_seq_len, m.head_dim};
    std::vector<std::vector<std::int64_t>> inputs = {{rows, steps}, {rows, 1}, {rows}, {steps}};
    inputs.insert(inputs.end(), static_cast<std::size_t>(2 * m.n_layer), layer);
    const std::vector<std::int64_t> added = {m.n_layer, rows, m.n_kv_head, steps, m.head_dim};
    loaded.check_signature(inputs, {logits, added, added});
  }

  Bundle bundle_;
  ScalarType type_;
  std::int64_t max_batch_ = 0, max_steps_ = 0;
  std::optional<ext::MmapDataLoader> loader_;  // outlives the program
  std::optional<et::Program> program_;         // outlives its methods
  std::map<std::string, std::unique_ptr<LoadedMethod>> methods_;
  std::vector<std::byte> new_keys_, new_values_;  // what a call returns before it is appended
};

}  // namespace

std::unique_ptr<Backend> open_backend(const Bundle& bundle, const BackendOptions& options) {
  if (options.device != "cpu") {
    throw Error("the program of '" + bundle.folder().string() +
                "' is lowered for the CPU (XNNPACK), not for the device '" + options.device + "'; leave out --device");
  }
  return std::make_unique<ExecuTorchBackend>(bundle, options.threads);
}

std::string backend_name() { return "executorch"; }
std::string backend_version() { return NANOCHAT_X_EXECUTORCH_VERSION; }

}  // namespace nanochat_x
