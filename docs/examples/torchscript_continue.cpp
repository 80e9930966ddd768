// Continues a prompt greedily with a bundle's model.pt: torchscript_continue BUNDLE COUNT ID ID ...
// Takes libtorch alone; docs/torchscript.md has the command that compiles it.
#include <torch/script.h>

#include <iostream>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const c10::InferenceMode no_autograd;
  torch::jit::Module model = torch::jit::load(std::string(argv[1]) + "/model.pt");
  std::vector<int64_t> ids;
  for (int i = 3; i < argc; ++i) ids.push_back(std::stoll(argv[i]));
  const int64_t count = std::stoll(argv[2]), room = static_cast<int64_t>(ids.size()) + count;
  const auto cache = model.get_method("empty_cache")({1, room}).toTuple();
  const at::Tensor cache_k = cache->elements()[0].toTensor(), cache_v = cache->elements()[1].toTensor();
  for (int64_t previous = 0, position = 0, done = 0; done < count; ++done) {
    const auto length = static_cast<int64_t>(ids.size());
    const auto out =
        model.get_method("prefill")({torch::tensor(ids).unsqueeze(0), torch::full({1, 1}, previous), cache_k, cache_v,
                                     torch::full({1}, position), torch::full({1}, length - 1)});
    const auto& tensors = out.toTupleRef().elements();
    cache_k.narrow(3, position, length).copy_(tensors[1].toTensor());
    cache_v.narrow(3, position, length).copy_(tensors[2].toTensor());
    previous = ids.back();
    position += length;
    ids = {tensors[0].toTensor()[0][-1].argmax().item<int64_t>()};
    std::cout << ids[0] << (done + 1 < count ? ' ' : '\n');
  }
}
