// AOTInductor: the bundle's programs are shared objects, run on libtorch; they share one memory-mapped set of weights.

#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>
#include <torch/version.h>

#ifndef _WIN32
#include <dlfcn.h>
#endif

#include <map>
#include <memory>
#include <string>
#include <unordered_map>

#include "guarded.h"
#include "nanochat_x/safetensors.h"
#include "torch_backend.h"

namespace nanochat_x {
namespace {

using Runner = torch::inductor::AOTIModelContainerRunnerCpu;

class AotiBackend final : public TorchBackend {
 public:
  AotiBackend(const Bundle& bundle, const BackendOptions& options)
      : TorchBackend(bundle, options), weights_(SafetensorsFile::open(bundle.path_of(bundle.manifest().weights))) {
    check_operators();
    check_rows("cos", bundle.manifest().max_seq_len, "max_seq_len");
    check_rows("model.lm_head.weight", bundle.manifest().vocab_size, "vocab_size");
    // What nearly every use needs is loaded right after its hash was checked; chatting never loads `full`.
    for (const char* role : {"prefill", "decode"}) {
      if (bundle.manifest().is_cached()) (void)program(role);
    }
  }

 private:
  std::vector<at::Tensor> call(const std::string& role, const std::vector<at::Tensor>& inputs) override {
    return program(role).run(inputs);
  }

  // Programs find the operators' functions by name among the symbols that the process shows; a call of one that is not
  // there would end the process.
  void check_operators() const {
#ifndef _WIN32
    for (const std::string& name : bundle().manifest().operators) {
      const std::string symbol = "aoti_torch_cpu_" + name;
      if (dlsym(RTLD_DEFAULT, symbol.c_str()) == nullptr) {
        throw Error("the bundle's programs call " + symbol +
                    ", which this program does not show to what it loads; link it with --export-dynamic-symbol=" +
                    symbol + ", or lower with --kernels stock");
      }
    }
#endif
  }

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

  // Loaded when it is first asked for. The files may have changed since all were checked, and loading runs code.
  Runner& program(const std::string& role) {
    auto& slot = programs_[role];
    if (!slot) {
      const std::string& path = file_of(role);
      bundle().verify_hash(path);
      auto runner = std::make_unique<Runner>(bundle().path_of(path).string());
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

  SafetensorsFile weights_;
  std::map<std::string, std::unique_ptr<Runner>> programs_;
};

}  // namespace

std::unique_ptr<Backend> open_backend(const Bundle& bundle, const BackendOptions& options) {
  return guarded("cannot open the bundle's programs", [&] { return std::make_unique<AotiBackend>(bundle, options); });
}

std::string backend_name() { return "aoti"; }

std::string backend_version() { return TORCH_VERSION; }

}  // namespace nanochat_x
