#include <algorithm>
#include <string>
#include <utility>

#include "check.h"
#include "decode_kernel.cuh"
#include "decoder.h"
#include "device_memory.h"
#include "layer_params.h"
#include "nanochat_x/error.h"

namespace nanochat_x::cuda {
namespace {

constexpr int kMostWidth = 2048;  // of the residual stream; a kernel is compiled for each 256 of it
// Rows of weights. Measured on an H100 at d20's shape: 5 to 8 rows gave 2,120 to 2,150 tokens/s, 12 gave 3 % less; with
// no bound, in an earlier state, 14 % less.
constexpr int kInFlight = 8;
using Kernel = void (*)(DecodeParams);

template <int... STEPS>
Kernel kernel_of(int steps, std::integer_sequence<int, STEPS...>) {
  Kernel found = nullptr;
  ((steps == STEPS + 1 ? void(found = decode_kernel<STEPS + 1>) : void()), ...);
  return found;
}

const __nv_bfloat16* bf16(const void* pointer) { return static_cast<const __nv_bfloat16*>(pointer); }

}  // namespace

const char* why_not(const DecoderModel& m) {
  if (m.n_head * kHeadDim != m.n_embd) return "heads are not 128 wide";
  if (m.n_kv_head < 1 || m.n_head % m.n_kv_head != 0) return "query heads are no multiple of key heads";
  if (m.n_embd > kMostWidth) return "the model is wider than 2048";
  if (m.mlp_width < m.n_embd || m.mlp_width % m.n_embd != 0) return "the MLP's width is no multiple of the model's";
  if (m.layers.empty() || m.layers.size() > kMostLayers) return "it has more than 48 layers, or none";
  if (m.vocab % 2 != 0 || m.vocab < m.n_embd) return "the vocabulary is odd or small";
  return "";
}

void check_can_decode(const DecoderModel& model) {
  if (const char* reason = why_not(model); *reason != '\0') throw Error(std::string("CUDA: cannot decode: ") + reason);
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) {
    throw Error("CUDA: this card is older than compute capability 9.0 (H100)");
  }
}

struct Decoder::Parts {
  explicit Parts(DecoderModel given) : model(std::move(given)) {
    std::vector<LayerParams> table;
    for (const DecoderLayer& layer : model.layers) table.push_back(layer_params(layer));
    layers = DeviceArray<LayerParams>(std::span<const LayerParams>(table));
    // Every block must have rows of every matrix: exchange.cuh relies on it.
    blocks = static_cast<int>(std::min<std::int64_t>(device_attribute(cudaDevAttrMultiProcessorCount),
                                                     std::min(model.n_embd, model.vocab) / 2));
    const auto c = static_cast<std::size_t>(model.n_embd), heads = static_cast<std::size_t>(model.n_head),
               kv_heads = static_cast<std::size_t>(model.n_kv_head), mlp = static_cast<std::size_t>(model.mlp_width);
    const std::size_t sizes[] = {
        (heads + 2 * kv_heads) * kHeadDim,   heads * (kHeadDim / 2) * kMostSplits, heads * kMostSplits, c, mlp / 2,
        2 * static_cast<std::size_t>(blocks)};
    Word** const fields[] = {&exchange.qkv, &exchange.partial, &exchange.lse,
                             &exchange.y,   &exchange.hidden,  &exchange.best};
    std::size_t total = 0;
    for (const std::size_t size : sizes) total += (size + 15) / 16 * 16;
    exchange.copy_stride = static_cast<int>(total);
    words = DeviceArray<Word>(total * kCopies);
    Word* next = words.data();
    for (std::size_t i = 0; i < std::size(sizes); ++i) {
      *fields[i] = next;
      next += (sizes[i] + 15) / 16 * 16;
    }
    state = DeviceArray<DecodeState>(1);
    drawn = DeviceArray<int>(static_cast<std::size_t>(kMostSteps));
    logits = DeviceArray<float>(static_cast<std::size_t>(model.vocab));
    kernel =
        kernel_of(static_cast<int>((model.n_embd + 255) / 256), std::make_integer_sequence<int, kMostWidth / 256>());
    shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const int width = static_cast<int>(model.n_embd);
    slots = (shared_bytes - ring_offset(width, static_cast<int>(model.mlp_width))) / (2 * width + kRowPadding);
    if (slots < 5 * kTile) throw Error("CUDA: this card's shared memory is too small for the model");
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_bytes),
          "asking for shared memory");
  }

  DecodeParams params(std::int64_t steps, const int* forced, const DecoderCache& cache) {
    DecodeParams p{};
    p.n_layer = static_cast<int>(model.layers.size());
    p.n_embd = static_cast<int>(model.n_embd);
    p.n_head = static_cast<int>(model.n_head);
    p.n_kv_head = static_cast<int>(model.n_kv_head);
    p.mlp_width = static_cast<int>(model.mlp_width);
    p.vocab = static_cast<int>(model.vocab);
    p.inverse_width = 1 / static_cast<float>(model.n_embd);
    p.norm_eps = model.norm_eps;
    p.qk_scale = model.qk_scale;
    p.softcap = model.softcap;
    p.gate_scale = model.gate_scale;
    p.gate_channels = static_cast<int>(model.gate_channels);
    p.smear_channels = static_cast<int>(model.smear_channels);
    p.smear_lambda = model.smear_lambda;
    p.backout_lambda = model.backout_lambda;
    p.backout_layer = static_cast<int>(model.backout_layer);
    p.layers = layers.data();
    p.wte = bf16(model.wte);
    p.lm_head = bf16(model.lm_head);
    p.smear_gate = model.smear_gate;
    p.cos = model.cos;
    p.sin = model.sin;
    p.cache_k = static_cast<__nv_bfloat16*>(cache.keys);
    p.cache_v = static_cast<__nv_bfloat16*>(cache.values);
    p.cache_head = cache.capacity * kHeadDim;
    p.cache_layer = p.cache_head * model.n_kv_head * cache.rows;
    p.exchange = exchange;
    p.first_flag = flag;
    flag += static_cast<unsigned>(steps) * static_cast<unsigned>(p.n_layer + 1);  // may wrap: only equality counts
    p.state = state.data();
    p.forced = forced;
    p.drawn = drawn.data();
    p.logits = logits.data();
    p.steps = static_cast<int>(steps);
    p.slots = slots;
    p.in_flight = kInFlight;
    return p;
  }

  DecoderModel model;
  DeviceArray<LayerParams> layers;
  DeviceArray<Word> words;
  DeviceArray<DecodeState> state;
  DeviceArray<int> drawn;
  DeviceArray<float> logits;
  Exchange exchange{};
  Kernel kernel = nullptr;
  int blocks = 0, shared_bytes = 0, slots = 0;
  unsigned flag = 1;  // words begin as zeros
};

Decoder::Decoder(DecoderModel model) {
  check_can_decode(model);
  parts_ = std::make_unique<Parts>(std::move(model));
}
Decoder::~Decoder() = default;
Decoder::Decoder(Decoder&&) noexcept = default;
Decoder& Decoder::operator=(Decoder&&) noexcept = default;

void Decoder::set_state(int token, int previous, int position, void* stream) {
  const DecodeState state{token, previous, position};
  check(cudaMemcpyAsync(parts_->state.data(), &state, sizeof(state), cudaMemcpyHostToDevice,
                        static_cast<cudaStream_t>(stream)),
        "setting the state");
}

void Decoder::run(std::int64_t steps, const int* forced, const DecoderCache& cache, void* stream) {
  if (steps < 1 || steps > kMostSteps) throw Error("CUDA: a run has 1 to 256 steps, not " + std::to_string(steps));
  DecodeParams params = parts_->params(steps, forced, cache);
  void* arguments[] = {&params};
  // Cooperative: all blocks are resident together, or none is. They wait for each other.
  check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(parts_->kernel),
                                    dim3(static_cast<unsigned>(parts_->blocks)), dim3(kThreads), arguments,
                                    static_cast<std::size_t>(parts_->shared_bytes), static_cast<cudaStream_t>(stream)),
        "starting the decode kernel");
}

const float* Decoder::logits() const { return parts_->logits.data(); }
const int* Decoder::drawn() const { return parts_->drawn.data(); }

}  // namespace nanochat_x::cuda
