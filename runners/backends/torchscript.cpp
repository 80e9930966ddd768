// TorchScript: one file with the weights and a method for each program, run by libtorch's interpreter.

#include <c10/core/InferenceMode.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>
#include <torch/version.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "guarded.h"
#include "torch_backend.h"

namespace nanochat_x {
namespace {

// Role -> method of the file's module.
const std::map<std::string, std::string>& methods() {
  static const std::map<std::string, std::string> names = {
      {"full", "forward"}, {"prefill", "prefill"}, {"decode", "decode"}};
  return names;
}

class TorchScriptBackend final : public TorchBackend {
 public:
  TorchScriptBackend(const Bundle& bundle, const BackendOptions& options) : TorchBackend(bundle, options) {
    for (const auto& [role, name] : methods()) {
      const auto path = bundle.manifest().programs.find(role);
      if (path != bundle.manifest().programs.end()) programs_.emplace(role, load_method(path->second, name));
    }
  }

 private:
  std::vector<at::Tensor> call(const std::string& role, const std::vector<at::Tensor>& inputs) override {
    const c10::InferenceMode no_autograd;
    // libtorch would rewrite the graph for the types and sizes that the first calls bring. That makes those calls
    // slower and, measured, no later one faster: what takes time are the products.
    const torch::jit::GraphOptimizerEnabledGuard as_it_is(false);
    (void)file_of(role);  // throws for a role that the bundle has not
    const c10::IValue result = programs_.at(role)({inputs.begin(), inputs.end()});
    if (result.isTensor()) return {result.toTensor()};
    std::vector<at::Tensor> outputs;
    if (result.isTuple()) {
      for (const c10::IValue& output : result.toTupleRef().elements()) {
        if (output.isTensor()) outputs.push_back(output.toTensor());
      }
    }
    return outputs;  // of anything else, none: the number of tensors is what is checked next
  }

  torch::jit::Method load_method(const std::string& path, const std::string& name) {
    auto module = modules_.find(path);
    if (module == modules_.end()) {
      // The file may have changed since all were checked, and loading runs code.
      bundle().verify_hash(path);
      module = modules_.emplace(path, torch::jit::load(bundle().path_of(path).string(), at::kCPU)).first;
    }
    const auto method = module->second.find_method(name);
    if (!method) throw Error("'" + path + "' has no method " + name + "; lower the model again");
    return *method;
  }

  std::map<std::string, torch::jit::Module> modules_;   // by file
  std::map<std::string, torch::jit::Method> programs_;  // by role
};

}  // namespace

std::unique_ptr<Backend> open_backend(const Bundle& bundle, const BackendOptions& options) {
  return guarded("cannot open the bundle's programs",
                 [&] { return std::make_unique<TorchScriptBackend>(bundle, options); });
}

std::string backend_name() { return "torchscript"; }

std::string backend_version() { return TORCH_VERSION; }

}  // namespace nanochat_x
