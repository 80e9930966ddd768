#include <utility>
#include <vector>

#include "batch_product.cuh"
#include "batch_products.h"
#include "check.h"
#include "launch.h"
#include "tensor_maps.h"

namespace nanochat_x::cuda {
namespace {

// How a product is cut: blocks of 64 `tiles` rows of the matrix, `ranks` of them to one run of rows, and how much of
// the shared memory one takes. Measured at d20's shape on an H100.
struct Cut {
  int tiles, ranks, kilobytes;
};
constexpr Cut kHeads{2, 4, 120}, kAttended{1, 4, 80}, kHidden{2, 4, 96}, kMlp{1, 8, 96}, kLogits{2, 1, 112};
constexpr int kXSlots = 4;  // chunks of x that a block has room for, if not all of its operands fit

constexpr bool has_slots(Cut cut) {
  return cut.kilobytes << 10 >=
         kXSlots * (64 * cut.tiles + static_cast<int>(BatchProducts::kMostRows)) * kOperandRowBytes;
}
static_assert(has_slots(kHeads) && has_slots(kAttended) && has_slots(kHidden) && has_slots(kMlp) && has_slots(kLogits),
              "there are no fewer slots for weights than for x");

constexpr int kColumnSizes[] = {16, 32, 64};  // rows of x that a kernel is compiled for

int size_of(std::int64_t rows) { return rows <= 16 ? 0 : rows <= 32 ? 1 : 2; }

template <After AFTER, int TILES, int RANKS, int COLUMNS>
void start_sized(BatchProductParams p, int kilobytes, cudaStream_t stream) {
  using Shape = BatchShape<TILES, COLUMNS, RANKS>;
  const auto kernel = batch_product<AFTER, TILES, COLUMNS, RANKS>;
  [[maybe_unused]] static const bool once = [&] {
    const auto* function = reinterpret_cast<const void*>(kernel);
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
          "asking for shared memory");
    check(
        cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "asking for shared memory");
    return true;
  }();
  const int chunks = (p.k / kOperandColumns + RANKS - 1) / RANKS, bytes = kilobytes << 10;
  const bool all_fit = chunks * (Shape::kWeightBytes + Shape::kXBytes) <= bytes;
  p.x_slots = all_fit ? chunks : std::min(chunks, kXSlots);
  p.weight_slots = std::min(chunks, (bytes - p.x_slots * Shape::kXBytes) / Shape::kWeightBytes);
  launch({.grid = dim3(RANKS, static_cast<unsigned>((p.n + Shape::kRows - 1) / Shape::kRows)),
          .threads = Shape::kBlockThreads,
          .stream = stream,
          .shared = static_cast<std::size_t>(Shape::shared_bytes(p.weight_slots, p.x_slots)),
          .dependent = true,
          .cluster = RANKS},
         kernel, p);
}

template <After AFTER, int TILES, int RANKS>
void start(const BatchProductParams& p, int kilobytes, cudaStream_t stream) {
  switch (size_of(p.rows)) {
    case 0:
      return start_sized<AFTER, TILES, RANKS, 16>(p, kilobytes, stream);
    case 1:
      return start_sized<AFTER, TILES, RANKS, 32>(p, kilobytes, stream);
    default:
      return start_sized<AFTER, TILES, RANKS, 64>(p, kilobytes, stream);
  }
}

}  // namespace

struct BatchProducts::Parts {
  // Of one layer's matrices, by blocks of rows.
  struct Maps {
    CUtensorMap heads, c_proj, c_fc, mlp_c_proj;
  };
  // Of what is multiplied with them, by the rows that a kernel takes.
  struct Inputs {
    CUtensorMap rounded, attended, hidden;
  };

  Parts(const DecoderModel& given, const BatchArrays& given_arrays) : model(given), arrays(given_arrays) {
    const std::int64_t c = model.n_embd;
    for (const DecoderLayer& layer : model.layers) {
      maps.push_back({matrix_map(layer.c_q, head_rows(), c, 64 * kHeads.tiles),
                      matrix_map(layer.c_proj, c, c, 64 * kAttended.tiles),
                      matrix_map(layer.c_fc, model.mlp_width, c, 64 * kHidden.tiles),
                      matrix_map(layer.mlp_c_proj, c, model.mlp_width, 64 * kMlp.tiles)});
    }
    head_map = matrix_map(model.lm_head, model.vocab, c, 64 * kLogits.tiles);
    for (const int size : kColumnSizes) {
      inputs.push_back({matrix_map(arrays.rounded, arrays.tokens, c, size),
                        matrix_map(arrays.attended, arrays.tokens, c, size),
                        matrix_map(arrays.hidden, arrays.tokens, model.mlp_width, size)});
    }
  }

  std::int64_t head_rows() const { return (model.n_head + 2 * model.n_kv_head) * 128; }
  const Inputs& inputs_of(std::int64_t rows) const { return inputs[static_cast<std::size_t>(size_of(rows))]; }

  BatchProductParams params(const CUtensorMap& weights, const CUtensorMap& x, std::int64_t rows, std::int64_t n,
                            std::int64_t k) const {
    BatchProductParams p{};
    p.weights = weights;
    p.x = x;
    p.rows = static_cast<int>(rows);
    p.n = static_cast<int>(n);
    p.k = static_cast<int>(k);
    p.norm = p.squares = squares(kMlp);
    p.inverse_width = 1 / static_cast<float>(model.n_embd);
    p.norm_eps = model.norm_eps;
    p.stream = arrays.x;
    p.own = 1;
    p.rounded = arrays.rounded;
    p.norm_factor = arrays.norm_factor;
    return p;
  }

  // Of the stream, as a product that is cut so has left them.
  RowSquares squares(Cut cut) const { return {arrays.squares, static_cast<int>(model.n_embd) / (64 * cut.tiles)}; }

  // What the stream becomes behind a layer: what the next one, or the head, takes.
  void then(BatchProductParams& p, std::size_t layer) const {
    const auto backout = model.backout_layer;
    if (static_cast<std::int64_t>(layer) == backout) p.middle = arrays.middle;
    if (layer + 1 < model.layers.size()) {
      const DecoderLayer& next = model.layers[layer + 1];
      p.own = next.resid_lambda;
      p.share = next.x0_lambda;
      if (p.share != 0) p.other = arrays.x0;
    } else if (static_cast<std::int64_t>(layer) == backout) {
      p.own = 1 - model.backout_lambda;
    } else if (backout >= 0) {
      p.share = -model.backout_lambda;
      p.other = arrays.middle;
    }
  }

  DecoderModel model;
  BatchArrays arrays;
  std::vector<Maps> maps;
  std::vector<Inputs> inputs;
  CUtensorMap head_map{};
};

BatchProducts::BatchProducts(const DecoderModel& model, const BatchArrays& arrays)
    : parts_(std::make_unique<Parts>(model, arrays)) {
  static_assert(kSquares == RowSquares::kMost);
}
BatchProducts::~BatchProducts() = default;
BatchProducts::BatchProducts(BatchProducts&&) noexcept = default;
BatchProducts& BatchProducts::operator=(BatchProducts&&) noexcept = default;

void BatchProducts::heads(std::size_t layer, std::int64_t rows, cudaStream_t stream) {
  const Parts& own = *parts_;
  BatchProductParams p =
      own.params(own.maps[layer].heads, own.inputs_of(rows).rounded, rows, own.head_rows(), own.model.n_embd);
  p.out = own.arrays.qkv;
  start<After::heads, kHeads.tiles, kHeads.ranks>(p, kHeads.kilobytes, stream);
}

void BatchProducts::add_attended(std::size_t layer, std::int64_t rows, cudaStream_t stream) {
  const Parts& own = *parts_;
  const std::int64_t c = own.model.n_embd;
  start<After::stream, kAttended.tiles, kAttended.ranks>(
      own.params(own.maps[layer].c_proj, own.inputs_of(rows).attended, rows, c, c), kAttended.kilobytes, stream);
}

void BatchProducts::add_mlp(std::size_t layer, std::int64_t rows, const Warming& next, cudaStream_t stream) {
  const Parts& own = *parts_;
  const std::int64_t c = own.model.n_embd, width = own.model.mlp_width;
  BatchProductParams inside = own.params(own.maps[layer].c_fc, own.inputs_of(rows).rounded, rows, width, c);
  inside.out = own.arrays.hidden;
  inside.norm = own.squares(kAttended);
  inside.warming = next;
  start<After::hidden, kHidden.tiles, kHidden.ranks>(inside, kHidden.kilobytes, stream);
  BatchProductParams p = own.params(own.maps[layer].mlp_c_proj, own.inputs_of(rows).hidden, rows, c, width);
  own.then(p, layer);
  start<After::stream, kMlp.tiles, kMlp.ranks>(p, kMlp.kilobytes, stream);
}

void BatchProducts::logits(std::int64_t rows, float* out, cudaStream_t stream) {
  const Parts& own = *parts_;
  BatchProductParams p = own.params(own.head_map, own.inputs_of(rows).rounded, rows, own.model.vocab, own.model.n_embd);
  p.logits = out;
  p.softcap = own.model.softcap;
  start<After::logits, kLogits.tiles, kLogits.ranks>(p, kLogits.kilobytes, stream);
}

}  // namespace nanochat_x::cuda
