#include <algorithm>
#include <string>
#include <utility>

#include "check.h"
#include "decode_kernel.cuh"
#include "decode_kernels.h"
#include "decode_plan.h"
#include "decoder.h"
#include "device_memory.h"
#include "layer_params.h"
#include "nanochat_x/error.h"
#include "packed_weights.h"
#include "tensor_maps.h"

namespace nanochat_x::cuda {
namespace {

// Bytes of weights that a block asks for at a time. Measured on an H100 at d20's shape: in bfloat16 16 to 32 KB gave
// the same, 48 KB 4 % less; in 8 bits 16 KB gave 2 % more than 24 and 5 % more than 32.
constexpr int kInFlight = 24 << 10, kPackedInFlight = 16 << 10;
constexpr float kMostScore = 80;  // log2 of an exponential: sums of thousands stay in float32's range

WeightFormat format_of(const DecoderModel& model) {
  return model.bits == 8 ? WeightFormat::kInt8 : model.bits == 4 ? WeightFormat::kInt4 : WeightFormat::kBfloat16;
}

DecodeKernel kernel_for(WeightFormat format, int groups, bool several) {
  if (format == WeightFormat::kInt8) return int8_kernel(groups, several);
  return format == WeightFormat::kInt4 ? int4_kernel(groups, several) : bfloat16_kernel(groups, several);
}

const __nv_bfloat16* bf16(const void* pointer) { return static_cast<const __nv_bfloat16*>(pointer); }

}  // namespace

const char* why_not(const DecoderModel& m) {
  if (m.n_head * kHeadDim != m.n_embd) return "heads are not 128 wide";
  if (m.n_kv_head < 1 || m.n_head % m.n_kv_head != 0) return "query heads are no multiple of key heads";
  if (m.n_embd > kMostWidth) return "the model is wider than 2048";
  if (m.mlp_width < m.n_embd || m.mlp_width % m.n_embd != 0) return "the MLP's width is no multiple of the model's";
  if (m.layers.empty() || m.layers.size() > kMostLayers) return "it has more than 48 layers, or none";
  if (m.bits != 16 && (m.quant_group % kGroup != 0 || m.n_embd % m.quant_group != 0)) {
    return "its groups of weights are no multiple of 32";
  }
  // Exponentials of scores are taken without the largest (attend.cuh).
  if (m.qk_scale * m.qk_scale * kHeadDim * kScoreScale > kMostScore) return "its queries and keys are scaled too much";
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
    const WeightFormat format = format_of(model);
    shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    for (const bool several : {false, true}) {
      kernels[several] = kernel_for(format, warp_groups(static_cast<int>(model.n_embd)), several);
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernels[several]),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
            "asking for shared memory");
    }
    shares = deal_out(model, clusters());
    for (int rows = 1; rows <= kMostRows; ++rows) {
      const BlockLayout layout = block_layout(model, shares, format, rows, sizeof(BlockMemory), shared_bytes);
      if (layout.ring_bytes == 0) break;
      layouts.push_back(layout);
    }
    if (layouts.empty()) throw Error("CUDA: this card's shared memory is too small for the model");
    if (format == WeightFormat::kBfloat16) {
      maps = tensor_maps(model);
    } else {
      packed = PackedWeights(model, shares);
    }
    const auto words = static_cast<std::size_t>(model.n_embd / 4) * kMostClusters;
    sums = DeviceArray<uint4>(3 * kMostRows * words);
    best = DeviceArray<Word>(kMostRows * shares.size() * kRanks * 2);
    exchange = {sums.data(), sums.data() + kMostRows * words, best.data()};
    state = DeviceArray<DecodeState>(kMostRows);
    drawn = DeviceArray<int>(static_cast<std::size_t>(kMostRows * kMostSteps));
    logits = DeviceArray<float>(static_cast<std::size_t>(kMostRows * model.vocab));
  }

  // Of a grid of clusters one block of which fills a multiprocessor.
  cudaLaunchConfig_t config(cudaLaunchAttribute (&attributes)[2], std::size_t grid) const {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {kRanks, 1, 1};
    // All blocks are resident together, or none is. They wait for each other.
    attributes[1].id = cudaLaunchAttributeCooperative;
    attributes[1].val.cooperative = 1;
    cudaLaunchConfig_t made{};
    made.gridDim = dim3(static_cast<unsigned>(grid * kRanks));
    made.blockDim = dim3(kThreads);
    made.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
    made.attrs = attributes;
    made.numAttrs = 2;
    return made;
  }

  // As many as fit on the card together; each must have a part of the MLP: exchange.cuh relies on it.
  int clusters() const {
    cudaLaunchAttribute attributes[2];
    const cudaLaunchConfig_t one = config(attributes, 1);
    int fit = 0;
    check(cudaOccupancyMaxActiveClusters(&fit, reinterpret_cast<const void*>(kernels[0]), &one), "asking for clusters");
    const auto most = std::min<std::int64_t>({fit, kMostClusters, model.mlp_width / kHiddenUnit});
    if (most < 1) throw Error("CUDA: this card has no room for a cluster of 8 blocks");
    return static_cast<int>(most);
  }

  DecodeParams params(std::int64_t steps, std::int64_t rows, const int* forced, const DecoderCache& cache) {
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
    p.cache_row = p.cache_head * model.n_kv_head;
    p.cache_layer = p.cache_row * cache.rows;
    p.exchange = exchange;
    p.first_flag = flag;
    flag += static_cast<unsigned>(steps) * static_cast<unsigned>(p.n_layer + 1);  // may wrap: only equality counts
    p.state = state.data();
    p.forced = forced;
    p.drawn = drawn.data();
    p.logits = logits.data();
    p.steps = static_cast<int>(steps);
    p.rows = static_cast<int>(rows);
    p.maps = maps.data();
    p.packed = packed.stream();
    p.clusters = static_cast<int>(shares.size());
    p.attention_clusters = std::min(p.clusters, p.n_kv_head);
    std::ranges::copy(shares, p.shares);
    p.layout = layouts[static_cast<std::size_t>(rows - 1)];
    p.in_flight = model.bits == 16 ? kInFlight : kPackedInFlight;
    return p;
  }

  DecoderModel model;
  DeviceArray<LayerParams> layers;
  std::vector<ClusterShare> shares;
  std::vector<BlockLayout> layouts;  // of one row, of two, ...
  DeviceArray<TensorMaps> maps;
  PackedWeights packed;
  DeviceArray<uint4> sums;
  DeviceArray<Word> best;
  DeviceArray<DecodeState> state;
  DeviceArray<int> drawn;
  DeviceArray<float> logits;
  Exchange exchange{};
  DecodeKernel kernels[2]{};  // of one row, of several
  int shared_bytes = 0;
  unsigned flag = 1;  // words begin as zeros
};

Decoder::Decoder(DecoderModel model) {
  check_can_decode(model);
  parts_ = std::make_unique<Parts>(std::move(model));
}
Decoder::~Decoder() = default;
Decoder::Decoder(Decoder&&) noexcept = default;
Decoder& Decoder::operator=(Decoder&&) noexcept = default;

void Decoder::set_states(std::span<const DecodeState> rows, void* stream) {
  check(cudaMemcpyAsync(parts_->state.data(), rows.data(), rows.size_bytes(), cudaMemcpyHostToDevice,
                        static_cast<cudaStream_t>(stream)),
        "setting the states");
}

void Decoder::run(std::int64_t steps, std::int64_t rows, const int* forced, const DecoderCache& cache, void* stream) {
  if (steps < 1 || steps > kMostSteps) throw Error("CUDA: a run has 1 to 256 steps, not " + std::to_string(steps));
  if (rows < 1 || rows > most_rows()) throw Error("CUDA: a run cannot have " + std::to_string(rows) + " rows");
  DecodeParams params = parts_->params(steps, rows, forced, cache);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = parts_->config(attributes, parts_->shares.size());
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, parts_->kernels[rows > 1], params), "starting the decode kernel");
}

std::int64_t Decoder::most_rows() const { return std::ssize(parts_->layouts); }
const float* Decoder::logits() const { return parts_->logits.data(); }
const int* Decoder::drawn() const { return parts_->drawn.data(); }

}  // namespace nanochat_x::cuda
