// Sampler and engine behind JSON lines, for the differential tests (tests/test_sampler_definition.py,
// tests/test_engine_rules.py): one request a line on stdin, one answer a line on stdout, {"error": ...} where the
// library throws. Sampling options are "temperature", "top_k", "top_p" and "seed".
//
//   {"op": "probabilities", "logits": [...], options}                        -> {"probabilities": [...]}
//   {"op": "draw", "logits": [...], "count": N, "stream": S, options}        -> {"ids": [...]}
//   {"op": "generate", "scripts": [[...], ...], "prompt": [...], "max_tokens": N, "num_samples": N, "raw": BOOL,
//    "max_seq_len": N, options}          -> {"samples": [{"ids", "mask", "stop"}, ...]}: the engine on the toy model of
//                                           fake_backend.h, with a tokenizer of single bytes; the anchor is id 259

#include <cstdint>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "fake_backend.h"
#include "json_lines.h"
#include "nanochat_x/engine.h"
#include "nanochat_x/sampler.h"

namespace {

using Json = nlohmann::json;
using namespace nanochat_x;

SamplingParams params_of(const Json& request) {
  SamplingParams params;
  params.temperature = request.value("temperature", 1.0);
  params.top_k = request.value("top_k", std::int64_t{0});
  params.top_p = request.value("top_p", 1.0);
  params.seed = request.value("seed", std::uint64_t{42});
  params.validate();
  return params;
}

class Driver {
 public:
  Json answer(const Json& request) const {
    const std::string op = request.at("op");
    const SamplingParams params = params_of(request);
    if (op == "generate") return generate(request, params);
    const std::vector<float> logits = request.at("logits");
    if (op == "probabilities") return {{"probabilities", Sampler::probabilities(logits, params)}};
    if (op != "draw") throw std::invalid_argument("unknown op " + op);
    Sampler sampler(params, request.value("stream", std::uint64_t{0}));
    std::vector<TokenId> ids(request.at("count").get<std::size_t>());
    for (TokenId& id : ids) id = sampler.sample(logits);
    return {{"ids", ids}};
  }

 private:
  Json generate(const Json& request, const SamplingParams& params) const {
    const std::int64_t vocab = tokenizer_.vocab_size();
    test::FakeBackend backend(
        {.vocab_size = vocab, .anchor = tokenizer_.special().assistant_start, .scripts = request.at("scripts")});
    const Manifest manifest = test::fake_manifest(vocab, request.at("max_seq_len"));
    GenerateOptions options;
    options.max_tokens = request.at("max_tokens");
    options.num_samples = request.at("num_samples");
    options.raw = request.at("raw");
    options.sampling = params;
    Json samples = Json::array();
    for (const Sample& sample : Engine(backend, manifest, tokenizer_).generate(request.at("prompt"), options).samples) {
      samples.push_back({{"ids", sample.ids}, {"mask", sample.mask}, {"stop", to_string(sample.stop)}});
    }
    return {{"samples", std::move(samples)}};
  }

  Tokenizer tokenizer_ = test::byte_tokenizer();
};

}  // namespace

int main() {
  return serve_json_lines("engine_driver", [] { return Driver(); });
}
