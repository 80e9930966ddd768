#include <algorithm>
#include <span>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "attend_prompt.cuh"
#include "attend_shared.cuh"
#include "attend_step.cuh"
#include "attend_tokens.cuh"
#include "batch_products.h"
#include "check.h"
#include "device_memory.h"
#include "forward_pass.h"
#include "launch.h"
#include "layer_params.h"
#include "matmul.h"
#include "nanochat_x/error.h"
#include "row_kernels.cuh"
#include "stream.h"
#include "warming.cuh"

namespace nanochat_x::cuda {
namespace {

constexpr std::int64_t kMostLogitRows = 256;  // computed at a time: 33 MB at nanochat's vocabulary
// Tokens a row from which on attention is by tiles of queries, 16 of which are one operand of the tensor cores.
constexpr std::int64_t kPromptLength = 9;
constexpr unsigned kElementThreads = 256;

// One pass, without what its logits are copied to.
struct Call {
  std::int64_t rows, length, kept;
  DecoderCache cache;  // of the pass's first row
  cudaStream_t stream;

  std::int64_t tokens() const { return rows * length; }
  // A step of one token a row that kernels of this project compute alone.
  bool is_batch() const { return length == 1 && rows <= BatchProducts::kMostRows && (kept == 0 || kept == rows); }
  auto key() const {
    return std::tuple(rows, length, kept, cache.keys, cache.values, cache.rows, cache.capacity, cache.shared);
  }
};

unsigned ceil_div(std::int64_t a, std::int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace

std::vector<Pass> passes_of(std::int64_t batch, std::int64_t length, std::int64_t most) {
  std::vector<Pass> passes;
  const std::int64_t rows_at_once = std::max<std::int64_t>(1, most / length);
  for (std::int64_t row = 0; row < batch; row += rows_at_once) {
    for (std::int64_t column = 0; column < length; column += most) {
      passes.push_back({row, std::min(rows_at_once, batch - row), column, std::min(most, length - column)});
    }
  }
  return passes;
}

struct ForwardPass::Parts {
  Parts(DecoderModel given, std::int64_t most)
      : model(std::move(given)), most_tokens(most), heads(model.n_head + 2 * model.n_kv_head) {
    for (const DecoderLayer& layer : model.layers) layers.push_back(layer_params(layer));
    for (const LayerParams& layer : layers) {
      if (layer.c_k != layer.c_q + model.n_embd * model.n_embd ||
          layer.c_v != layer.c_k + model.n_kv_head * kHeadDim * model.n_embd) {
        throw Error("CUDA: a layer's c_q, c_k and c_v do not lie one behind the other");
      }
    }
    const auto array = [](auto& to, std::int64_t count) {
      to = std::remove_reference_t<decltype(to)>(static_cast<std::size_t>(count));
    };
    const std::int64_t c = model.n_embd;
    array(inputs, 4 * most);
    array(x, most * c);
    array(x0, most * c);
    if (model.backout_layer >= 0) array(middle, most * c);
    array(normed, most * c);
    array(qkv, most * heads * kHeadDim);
    array(attended, most * c);
    array(hidden, most * model.mlp_width);
    multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
    array(parts, std::max<std::int64_t>(kPartBlocks, 2 * multiprocessors) * kPartStride);
    array(shared_parts,
          kQueryTile * std::max(multiprocessors, model.n_head * query_tiles(shared_rows())) * kPartStride);
    array(arrived, most * model.n_head);
    array(logits, std::min(most, kMostLogitRows) * model.vocab);
    array(squares, most * RowSquares::kMost);
    array(norm_factor, most);
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(attend_prompt),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, kPromptShared),
          "asking for shared memory");
    // A multiprocessor runs two kernels at a time only if they divide its memory alike (batch_product.cuh).
    for (const void* function :
         {reinterpret_cast<const void*>(attend_step), reinterpret_cast<const void*>(attend_shared),
          reinterpret_cast<const void*>(embed_rows)}) {
      check(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared),
            "asking for shared memory");
    }
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(attend_step), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               sizeof(AttendStepMemory)),
          "asking for shared memory");
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(attend_shared),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, shared_keys_bytes(2)),
          "asking for shared memory");
    products = std::make_unique<BatchProducts>(model, BatchArrays{.tokens = most,
                                                                  .x = x.data(),
                                                                  .x0 = x0.data(),
                                                                  .middle = middle.data(),
                                                                  .rounded = normed.data(),
                                                                  .attended = attended.data(),
                                                                  .qkv = qkv.data(),
                                                                  .hidden = hidden.data(),
                                                                  .squares = squares.data(),
                                                                  .norm_factor = norm_factor.data()});
  }

  void run(const Step& step, const Pass& pass, const DecoderCache& first, float* out, cudaStream_t stream) {
    const std::int64_t row_bytes = model.n_kv_head * first.capacity * kHeadDim * 2 * pass.first_row;
    Call call{pass.rows, pass.columns, 0, first, stream};
    call.cache.keys = static_cast<char*>(first.keys) + row_bytes;
    call.cache.values = static_cast<char*>(first.values) + row_bytes;
    call.kept = upload(step, pass, stream);
    if (pass.columns == 1 && call.kept <= kMostLogitRows) {
      start_alike(call);
    } else {
      layers_of(call);
    }
    // The pass's columns of the kept ones, in each row.
    const auto& kept = step.logits_to_keep;
    const std::int64_t begin = std::ranges::lower_bound(kept, pass.first_column) - kept.begin();
    const std::int64_t columns = pass.rows > 0 ? call.kept / pass.rows : 0, all = std::ssize(kept);
    for (std::int64_t done = 0; done < call.kept; done += kMostLogitRows) {
      const std::int64_t count = std::min(kMostLogitRows, call.kept - done);
      if (pass.columns > 1 || call.kept > kMostLogitRows) head_of(call, done, count);
      for (std::int64_t i = done; i < done + count;) {  // runs that lie together in `out`
        const std::int64_t column = i % columns, here = std::min(columns - column, done + count - i);
        const std::int64_t to = (pass.first_row + i / columns) * all + begin + column;
        const std::int64_t together = columns == all ? done + count - i : here;
        check(cudaMemcpyAsync(out + to * model.vocab, logits.data() + (i - done) * model.vocab,
                              static_cast<std::size_t>(together * model.vocab) * sizeof(float), cudaMemcpyDefault,
                              stream),
              "reading logits");
        i += together;
      }
    }
  }

  // Tokens, those before them, positions and the tokens whose logits are wanted, the number of which it returns.
  std::int64_t upload(const Step& step, const Pass& pass, cudaStream_t stream) {
    std::vector<int> host;
    const auto id_at = [&](std::int64_t row, std::int64_t column) {
      return static_cast<int>(step.input_ids[static_cast<std::size_t>(row * step.length + column)]);
    };
    const std::int64_t end = pass.first_row + pass.rows;
    for (std::int64_t row = pass.first_row; row < end; ++row) {
      for (std::int64_t i = 0; i < pass.columns; ++i) host.push_back(id_at(row, pass.first_column + i));
    }
    for (std::int64_t row = pass.first_row; row < end; ++row) {
      for (std::int64_t i = pass.first_column; i < pass.first_column + pass.columns; ++i) {
        host.push_back(i > 0 ? id_at(row, i - 1) : static_cast<int>(step.prev_ids[static_cast<std::size_t>(row)]));
      }
    }
    for (std::int64_t row = pass.first_row; row < end; ++row) {
      host.push_back(static_cast<int>(step.position[static_cast<std::size_t>(row)] + pass.first_column));
    }
    std::int64_t kept = 0;
    for (std::int64_t row = 0; row < pass.rows; ++row) {
      for (const std::int64_t column : step.logits_to_keep) {
        if (column < pass.first_column || column >= pass.first_column + pass.columns) continue;
        host.push_back(static_cast<int>(row * pass.columns + column - pass.first_column));
        ++kept;
      }
    }
    check(cudaMemcpyAsync(inputs.data(), host.data(), host.size() * sizeof(int), cudaMemcpyHostToDevice, stream),
          "copying token ids");
    return kept;
  }

  // A step of one token a row, as a graph if the last one was like it.
  void start_alike(const Call& call) {
    const auto all = [&] {
      layers_of(call);
      if (call.kept > 0) head_of(call, 0, call.kept);
    };
    if (last_key != call.key()) {
      last_key = call.key();
      graph = {};
      all();
      return;
    }
    if (!graph) graph = Graph(call.stream, all);
    graph.start(call.stream);
  }

  PassTokens tokens_of(const Call& call) const {
    const int* begin = inputs.data();
    return {begin, begin + call.tokens(), begin + 2 * call.tokens(), static_cast<int>(call.length)};
  }

  void layers_of(const Call& call) {
    embed(call);
    for (std::size_t i = 0; i < layers.size(); ++i) {
      if (call.is_batch()) {
        products->heads(i, call.rows, call.stream);
        attention(call, i);
        products->add_attended(i, call.rows, call.stream);
        products->add_mlp(i, call.rows, warming(call, i + 1), call.stream);
      } else {
        layer(call, i);
      }
    }
  }

  static bool has_lambdas(const LayerParams& w) { return w.resid_lambda != 1 || w.x0_lambda != 0; }

  void embed(const Call& call) {
    EmbedParams p{};
    p.tokens = tokens_of(call);
    p.n_embd = static_cast<int>(model.n_embd);
    p.wte = static_cast<const __nv_bfloat16*>(model.wte);
    p.inverse_width = 1 / static_cast<float>(model.n_embd);
    p.norm_eps = model.norm_eps;
    p.smear_channels = static_cast<int>(model.smear_channels);
    p.smear_gate = model.smear_gate;
    p.smear_lambda = model.smear_lambda;
    p.x = x.data();
    p.x0 = x0.data();
    p.own = 1;
    if (call.is_batch()) {
      p.own = layers.front().resid_lambda + layers.front().x0_lambda;
      p.rounded = normed.data();
      p.squares = {squares.data(), RowSquares::kMost};
    }
    launch({.grid = dim3(static_cast<unsigned>(call.tokens())), .threads = kRowThreads, .stream = call.stream},
           embed_rows, p);
  }

  NormParams norm_params() {
    NormParams p{};
    p.n_embd = static_cast<int>(model.n_embd);
    p.inverse_width = 1 / static_cast<float>(model.n_embd);
    p.norm_eps = model.norm_eps;
    p.x = x.data();
    p.normed = normed.data();
    return p;
  }

  void norm(const Call& call, const NormParams& p, std::int64_t rows) {
    launch(
        {.grid = dim3(static_cast<unsigned>(rows)), .threads = kRowThreads, .stream = call.stream, .dependent = true},
        norm_rows, p);
  }

  void layer(const Call& call, std::size_t index) {
    using Output = Matmul::Output;
    const LayerParams& w = layers[index];
    const std::int64_t rows = call.tokens(), c = model.n_embd, mlp = model.mlp_width;
    NormParams p = norm_params();
    if (has_lambdas(w)) {
      p.other = x0.data();
      p.own = w.resid_lambda;
      p.share = w.x0_lambda;
      p.keeps = true;
    }
    if (static_cast<std::int64_t>(index) == model.backout_layer + 1) p.middle = middle.data();
    norm(call, p, rows);
    matmul.multiply(normed.data(), w.c_q, qkv.data(), Output::bfloat16, rows, heads * kHeadDim, c, call.stream);
    attention(call, index);
    matmul.multiply(attended.data(), w.c_proj, x.data(), Output::add_float32, rows, c, c, call.stream);
    norm(call, norm_params(), rows);
    matmul.multiply(normed.data(), w.c_fc, hidden.data(), Output::bfloat16, rows, mlp, c, call.stream);
    const std::int64_t eights = rows * mlp / 8;
    launch({.grid = dim3(ceil_div(eights, kElementThreads)),
            .threads = kElementThreads,
            .stream = call.stream,
            .dependent = true},
           square_relu, reinterpret_cast<uint4*>(hidden.data()), static_cast<int>(eights));
    matmul.multiply(hidden.data(), w.mlp_c_proj, x.data(), Output::add_float32, rows, c, mlp, call.stream);
  }

  HeadParams head_params(const Call& call, std::size_t index) {
    const LayerParams& w = layers[index];
    HeadParams h{};
    h.tokens = tokens_of(call);
    h.n_head = static_cast<int>(model.n_head);
    h.n_kv_head = static_cast<int>(model.n_kv_head);
    h.n_embd = static_cast<int>(model.n_embd);
    h.norm_eps = model.norm_eps;
    h.qk_scale = model.qk_scale;
    h.cos = model.cos;
    h.sin = model.sin;
    h.normed = normed.data();
    if (call.is_batch()) h.norm_factor = norm_factor.data();
    h.value_embed = w.value_embed;
    h.ve_gate = w.ve_gate;
    h.gate_channels = static_cast<int>(model.gate_channels);
    h.gate_scale = model.gate_scale;
    h.qkv = qkv.data();
    h.cache_head = call.cache.capacity * kHeadDim;
    h.cache_row = h.cache_head * model.n_kv_head;
    const std::int64_t layer = h.cache_row * call.cache.rows * static_cast<std::int64_t>(index);
    h.keys = static_cast<__nv_bfloat16*>(call.cache.keys) + layer;
    h.values = static_cast<__nv_bfloat16*>(call.cache.values) + layer;
    return h;
  }

  // What the attention of layer `index` begins with; behind the last layer, nothing.
  Warming warming(const Call& call, std::size_t index) {
    if (index == layers.size()) return {};
    const HeadParams h = head_params(call, index);
    return {.keys = h.keys,
            .values = h.values,
            .cache_row = h.cache_row,
            .cache_head = h.cache_head,
            .position = h.tokens.position,
            .rows = static_cast<int>(call.rows),
            .n_kv_head = h.n_kv_head,
            .window = layers[index].window,
            .shared = shared_keys(call, layers[index].window).count,
            .most = kWarmed};
  }

  AttendParams attend_params(const Call& call, const HeadParams& h, int window) {
    AttendParams a{};
    a.q = qkv.data();
    a.keys = h.keys;
    a.values = h.values;
    a.q_stride = heads * kHeadDim;
    a.cache_row = h.cache_row;
    a.cache_head = h.cache_head;
    a.position = h.tokens.position;
    a.length = static_cast<int>(call.length);
    a.capacity = static_cast<int>(call.cache.capacity);
    a.n_head = h.n_head;
    a.group = h.n_head / h.n_kv_head;
    a.window = window;
    a.out = attended.data();
    a.parts = parts.data();
    return a;
  }

  void attention(const Call& call, std::size_t index) {
    const HeadParams h = head_params(call, index);
    const AttendParams a = attend_params(call, h, layers[index].window);
    const auto head_count = static_cast<unsigned>(a.n_head), queries = static_cast<unsigned>(call.tokens());
    if (call.length == 1) {  // keys and values are made by the blocks that read those before them
      const AttendStepParams step{h, a, static_cast<int>(call.rows), arrived.data(), shared_keys(call, a.window)};
      if (step.shared.count > 0) attend_together(call, step);
      launch({.grid = dim3(static_cast<unsigned>(multiprocessors)),
              .threads = kStepThreads,
              .stream = call.stream,
              .shared = sizeof(AttendStepMemory),
              .dependent = true},
             attend_step, step);
      return;
    }
    launch({.grid = dim3(queries, ceil_div(heads, kHeadsAtOnce)),
            .threads = kHeadsAtOnce * kHeadLanes,
            .stream = call.stream},
           prepare_heads, h);
    if (call.length >= kPromptLength) {
      const dim3 grid(head_count, static_cast<unsigned>(call.rows), ceil_div(call.length, kQueryTile));
      launch({.grid = grid, .threads = kTileThreads, .stream = call.stream, .shared = kPromptShared}, attend_prompt, a);
      return;
    }
    launch({.grid = dim3(pieces_of(call), head_count, queries), .threads = kTokenThreads, .stream = call.stream},
           attend_tokens, a);
    join(call, a);
  }

  std::int64_t shared_rows() const { return std::min(most_tokens, kMostSharedRows); }
  static std::int64_t query_tiles(std::int64_t rows) { return (rows + kQueryTile - 1) / kQueryTile; }

  // What a step's rows attend to together in a layer: in as many chunks as there are multiprocessors for.
  SharedKeys shared_keys(const Call& call, std::int64_t window) const {
    const std::int64_t count = call.cache.shared;
    if (call.rows > shared_rows() || call.rows * count < kLeastShared) return {};
    const std::int64_t most = std::max<std::int64_t>(1, multiprocessors / (model.n_head * query_tiles(call.rows)));
    const std::int64_t tiles = ceil_div(std::max<std::int64_t>(1, std::min(count, window)), kKeyTile);
    const std::int64_t tiles_a_chunk = ceil_div(tiles, most);
    return {static_cast<int>(count), static_cast<int>(ceil_div(tiles, tiles_a_chunk)), shared_parts.data()};
  }

  void attend_together(const Call& call, const AttendStepParams& step) {
    const bool one_tile = ceil_div(step.shared.count, kKeyTile) <= static_cast<unsigned>(step.shared.chunks);
    launch({.grid = dim3(static_cast<unsigned>(step.shared.chunks), static_cast<unsigned>(step.attend.n_head),
                         static_cast<unsigned>(query_tiles(call.rows))),
            .threads = kTileThreads,
            .stream = call.stream,
            .shared = static_cast<std::size_t>(shared_keys_bytes(one_tile ? 1 : 2)),
            .dependent = true},
           attend_shared, step);
  }

  // Into how many pieces the keys of a query are split.
  unsigned pieces_of(const Call& call) const {
    return static_cast<unsigned>(
        std::clamp<std::int64_t>(kPartBlocks / (model.n_head * call.tokens()), 1, kMostPieces));
  }

  void join(const Call& call, const AttendParams& a) {
    if (pieces_of(call) == 1) return;
    launch({.grid = dim3(static_cast<unsigned>(a.n_head), static_cast<unsigned>(call.tokens())),
            .threads = kHeadDim,
            .stream = call.stream,
            .dependent = true},
           join_pieces, static_cast<const float*>(a.parts), static_cast<int>(pieces_of(call)), a.out);
  }

  // The logits of `count` of the tokens that are wanted, from the one of number `begin` on.
  void head_of(const Call& call, std::int64_t begin, std::int64_t count) {
    if (call.is_batch()) {
      products->logits(call.rows, logits.data(), call.stream);
      return;
    }
    NormParams p = norm_params();
    p.rows = inputs.data() + 2 * call.tokens() + call.rows + begin;
    if (model.backout_layer >= 0) {
      // What the last layer left is not kept by a layer behind it.
      p.other = model.backout_layer + 1 < std::ssize(layers) ? middle.data() : x.data();
      p.own = 1;
      p.share = -model.backout_lambda;
    }
    norm(call, p, count);
    matmul.multiply(normed.data(), model.lm_head, logits.data(), Matmul::Output::float32, count, model.vocab,
                    model.n_embd, call.stream);
    if (model.softcap <= 0) return;
    const std::int64_t pairs = count * model.vocab / 2;
    launch({.grid = dim3(ceil_div(pairs, kElementThreads)), .threads = kElementThreads, .stream = call.stream},
           cap_logits, reinterpret_cast<float2*>(logits.data()), static_cast<int>(pairs), model.softcap);
  }

  // Blocks of attention that are enough for the card: fewer queries have their keys split.
  static constexpr std::int64_t kPartBlocks = 512;
  // Keys of a head that are in the L2 cache before attention begins: 64 rows of d20 have 21 MB of them and their
  // values.
  static constexpr int kWarmed = 64;
  // Rows that attend together at most, which decides memory (4.5 MB at d20), and from how many common keys on, counted
  // in each row: of d20's on an H100 4 x 512 were 2 % slower than by themselves, 8 x 512 10 % faster.
  static constexpr std::int64_t kMostSharedRows = 512, kLeastShared = 2500;

  DecoderModel model;
  std::int64_t most_tokens, heads;  // heads: of queries, keys and values
  std::int64_t multiprocessors = 0;
  std::vector<LayerParams> layers;
  Matmul matmul;
  DeviceArray<int> inputs;           // a pass's tokens, as `upload` lays them out
  DeviceArray<float> x, x0, middle;  // [tokens, n_embd]: the residual stream, the embedding, the layer to back out
  DeviceArray<__nv_bfloat16> normed, qkv, attended, hidden;
  DeviceArray<float> parts, logits;
  DeviceArray<float> shared_parts;          // of attention that rows have in common
  DeviceArray<unsigned> arrived;            // parts of attention, in a step of one token a row
  DeviceArray<float> squares, norm_factor;  // of the rows of a batch
  std::unique_ptr<BatchProducts> products;
  Graph graph;
  decltype(std::declval<Call>().key()) last_key{};
};

ForwardPass::ForwardPass(DecoderModel model, std::int64_t most_tokens) {
  check_can_decode(model);
  if (most_tokens < 1) throw Error("CUDA: a pass has at least one token, not " + std::to_string(most_tokens));
  parts_ = std::make_unique<Parts>(std::move(model), most_tokens);
}
ForwardPass::~ForwardPass() = default;
ForwardPass::ForwardPass(ForwardPass&&) noexcept = default;
ForwardPass& ForwardPass::operator=(ForwardPass&&) noexcept = default;

void ForwardPass::step(const Step& step, const DecoderCache& cache, float* logits, void* stream) {
  for (const Pass& pass : passes_of(step.batch, step.length, parts_->most_tokens)) {
    parts_->run(step, pass, cache, logits, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace nanochat_x::cuda
