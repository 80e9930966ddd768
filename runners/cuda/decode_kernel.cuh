#pragma once

// Whole steps of decoding in one launch: a block on each multiprocessor, all of them resident. A step is 5 products a
// layer, each spread over all blocks, and what lies between them, which every block computes for itself: the residual
// stream is in every block's registers, thread t has the four elements from 4 (t + 256 i) on.

#include <cuda_bf16.h>

#include <cstdint>

#include "attend.cuh"
#include "exchange.cuh"
#include "product.cuh"
#include "ring.cuh"

namespace nanochat_x::cuda {

// The matrices of a step in the order in which they are multiplied: four a layer, then the head.
enum Matrix { kQkv, kAttentionOut, kMlpIn, kMlpOut, kHead, kMatrices };

__device__ inline Matrix matrix_of(int stage, int n_layer) {
  return stage == 4 * n_layer ? kHead : static_cast<Matrix>(stage % 4);
}

// What a block keeps in shared memory in front of the ring.
struct BlockMemory {
  Barriers barriers;
  Sums sums;
  AttentionMemory attention;
  float embedding[kConsumerWarps][4], best[kConsumerWarps][2];
  alignas(16) float squares[kConsumerWarps];
  Share shares[kMatrices];  // this block's rows of each matrix
  LayerParams layers[kMostLayers];
};

__host__ __device__ inline int vectors_offset() { return (static_cast<int>(sizeof(BlockMemory)) + 127) / 128 * 128; }
// Of the ring: behind the normed stream [C] and the MLP's inside [mlp_width], bfloat16.
__host__ __device__ inline int ring_offset(int n_embd, int mlp_width) {
  return vectors_offset() + (2 * (n_embd + mlp_width) + 127) / 128 * 128;
}

// --- the producer: every row that this block multiplies with, in the order in which `Consumer` does

template <typename RowOf>
__device__ void stream(RingWriter& ring, Share share, int chunks, int chunk_columns, RowOf row_of) {
  for (int first = share.begin; first < share.end; first += kPassRows) {
    const int last = min(first + kPassRows, share.end);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      for (int row = first; row < last; row += kTile) {
        ring.put(min(kTile, last - row), [&](int i) { return row_of(row + i) + chunk * chunk_columns; });
      }
    }
  }
}

__device__ inline int most_splits(const DecodeParams& p) {
  return max(1, min(kMostSplits, static_cast<int>(gridDim.x) / p.n_kv_head));
}

// Has the keys and values that this block will attend to brought into the L2 cache.
__device__ inline void prefetch_split(const DecodeParams& p, int layer, const Splits& splits) {
  const int own = static_cast<int>(blockIdx.x);
  if (own >= p.n_kv_head * splits.pieces || threadIdx.x % 32 != 0) return;
  const int begin = min(own % splits.pieces * splits.length, splits.count);
  const int count = min(splits.length, splits.count - begin);
  if (count <= 0) return;
  const long long at = layer * p.cache_layer + own / splits.pieces * p.cache_head +
                       static_cast<long long>(splits.first + begin) * kHeadDim;
  for (const __nv_bfloat16* from : {p.cache_k + at, p.cache_v + at}) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(count * kHeadDim * 2) : "memory");
  }
}

__device__ inline void produce(const DecodeParams& p, BlockMemory& memory, unsigned char* ring_memory) {
  RingWriter ring(&memory.barriers, ring_memory, p.slots, 2 * p.n_embd, p.in_flight);
  const int queries = p.n_head * kHeadDim, keys = p.n_kv_head * kHeadDim;
  const long long c = p.n_embd;
  const int position = p.state->position;
  for (int step = 0; step < p.steps; ++step) {
    for (int stage = 0; stage <= 4 * p.n_layer; ++stage) {
      const Matrix matrix = matrix_of(stage, p.n_layer);
      const Share share = memory.shares[matrix];
      const LayerParams& w = memory.layers[min(stage / 4, p.n_layer - 1)];
      const __nv_bfloat16* weights = p.lm_head;
      if (matrix == kQkv) {
        prefetch_split(p, stage / 4, Splits(position + step, w.window, most_splits(p)));
        stream(ring, share, 1, 0, [&](int row) {
          if (row < queries) return w.c_q + row * c;
          return row < queries + keys ? w.c_k + (row - queries) * c : w.c_v + (row - queries - keys) * c;
        });
        continue;
      }
      if (matrix == kAttentionOut) weights = w.c_proj;
      if (matrix == kMlpIn) weights = w.c_fc;
      if (matrix == kMlpOut) weights = w.mlp_c_proj;
      const long long width = matrix == kMlpOut ? p.mlp_width : p.n_embd;
      stream(ring, share, static_cast<int>(width) / p.n_embd, p.n_embd, [&](int row) { return weights + row * width; });
    }
  }
}

// --- the consumers

// Four neighbouring elements of a vector.
struct Quad {
  float v[4];

  __device__ static Quad unpacked(uint2 bits) {
    const float2 low = unpack(bits.x), high = unpack(bits.y);
    return {{low.x, low.y, high.x, high.y}};
  }
  __device__ uint2 packed() const { return make_uint2(pack(v[0], v[1]), pack(v[2], v[3])); }
  __device__ float squares() const { return v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3]; }
  // this = own * this + share * other
  __device__ void combine(float own, float share, const Quad& other) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = own * v[i] + share * other.v[i];
  }
};

template <int STEPS>
class Consumer {
 public:
  __device__ Consumer(const DecodeParams& params, BlockMemory& memory, unsigned char* vectors, unsigned char* ring)
      : p_(params),
        memory_(memory),
        x_shared_(reinterpret_cast<__nv_bfloat16*>(vectors)),
        hidden_(x_shared_ + params.n_embd),
        ring_{&memory.barriers, ring, params.slots, 2 * params.n_embd + kRowPadding} {}

  __device__ void run() {
    int token = p_.forced ? p_.forced[0] : p_.state->token;
    int previous = p_.state->previous;
    const int begin = p_.state->position;
    for (int step = 0; step < p_.steps; ++step) {
      // Keys that other blocks appended in the steps before are read below.
      __threadfence();
      first_flag_ = p_.first_flag + static_cast<unsigned>(step) * static_cast<unsigned>(p_.n_layer + 1);
      position_ = begin + step;
      token_ = token;
      embed(token, previous);
      best_ = -INFINITY;
      best_row_ = p_.vocab;
      // One loop for all products: the instructions of five would not fit into the instruction cache.
      for (int stage = 0; stage <= 4 * p_.n_layer; ++stage) run_stage(stage, step == p_.steps - 1);
      const int drawn = most_likely(best_, best_row_, first_flag_ + static_cast<unsigned>(p_.n_layer));
      if (blockIdx.x == 0 && thread_ == 0) p_.drawn[step] = drawn;
      previous = token;
      token = p_.forced && step + 1 < p_.steps ? p_.forced[step + 1] : drawn;
    }
    // All blocks have read the state: this one has had words of the last step from each of them.
    if (blockIdx.x == 0 && thread_ == 0) *p_.state = {token, previous, begin + p_.steps};
  }

 private:
  static constexpr int kQuads = (STEPS + 3) / 4;  // of elements of the residual stream, in a thread

  __device__ bool has(int i) const { return 4 * (thread_ + i * kConsumers) < p_.n_embd; }

  // x = norm(wte[token]), with a share of the normed row of the token before
  __device__ void embed(int token, int previous) {
    const auto* row = reinterpret_cast<const uint2*>(p_.wte + static_cast<long long>(token) * p_.n_embd);
    const auto* before = reinterpret_cast<const uint2*>(p_.wte + static_cast<long long>(previous) * p_.n_embd);
    const bool smear = p_.smear_channels > 0 && position_ > 0;
    rotary_ = {reinterpret_cast<const float2*>(p_.cos + static_cast<long long>(position_) * (kHeadDim / 2))[lane_],
               reinterpret_cast<const float2*>(p_.sin + static_cast<long long>(position_) * (kHeadDim / 2))[lane_]};
    Quad old[kQuads] = {};
    float squares = 0, old_squares = 0, gate = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      x_[i] = {};
      if (!has(i)) continue;
      const int quad = thread_ + i * kConsumers;
      x_[i] = Quad::unpacked(row[quad]);
      squares += x_[i].squares();
      if (!smear) continue;
      old[i] = Quad::unpacked(before[quad]);
      old_squares += old[i].squares();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (4 * quad + j < p_.smear_channels) gate += x_[i].v[j] * p_.smear_gate[4 * quad + j];
      }
    }
    squares = warp_sum(squares);
    old_squares = warp_sum(old_squares);
    gate = warp_sum(gate);
    if (lane_ == 0) {
      memory_.embedding[warp_][0] = squares;
      memory_.embedding[warp_][1] = old_squares;
      memory_.embedding[warp_][2] = gate;
    }
    consumers_sync();
    float sums[3] = {};
#pragma unroll
    for (int i = 0; i < kConsumerWarps; ++i) {
#pragma unroll
      for (int j = 0; j < 3; ++j) sums[j] += memory_.embedding[i][j];
    }
    const float factor = inverse_norm(sums[0]), old_factor = inverse_norm(sums[1]);
    const float share = smear ? p_.smear_lambda * sigmoid(sums[2] * factor) * old_factor : 0.0F;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      x_[i].combine(factor, share, old[i]);
      x0_[i] = middle_[i] = x_[i];
    }
  }

  __device__ void run_stage(int stage, bool last_step) {
    const int layer = stage / 4;
    const Matrix matrix = matrix_of(stage, p_.n_layer);
    const LayerParams& w = memory_.layers[min(layer, p_.n_layer - 1)];
    const unsigned flag = first_flag_ + static_cast<unsigned>(layer);
    if (matrix == kAttentionOut) {
      const Splits splits(position_, w.window, most_splits(p_));
      const int own = static_cast<int>(blockIdx.x);
      if (own < p_.n_kv_head * splits.pieces) {
        attend_split(layer, w, splits, own / splits.pieces, own % splits.pieces, flag);
      }
      join_splits(splits.pieces, flag);
      consumers_sync();
    } else if (matrix == kMlpOut) {
      pause(kShortestWait);
      fetch_hidden(flag);
    } else {
      if (matrix == kMlpIn) {
        add(own_copy(p_.exchange.y), flag);
      } else if (stage > 0) {
        add(own_copy(p_.exchange.y) + p_.n_embd / 2, flag - 1);
        if (layer - 1 == p_.backout_layer) keep_middle();
      }
      if (matrix == kQkv) {
#pragma unroll
        for (int i = 0; i < kQuads; ++i) x_[i].combine(w.resid_lambda, w.x0_lambda, x0_[i]);
      } else if (matrix == kHead && p_.backout_layer >= 0) {
#pragma unroll
        for (int i = 0; i < kQuads; ++i) x_[i].combine(1, -p_.backout_lambda, middle_[i]);
      }
      factor_ = share_normed();
    }
    const Share rows = memory_.shares[matrix];
    product<STEPS>(ring_, memory_.sums, sums_turn_, matrix == kMlpOut ? hidden_ : x_shared_, p_.n_embd,
                   rows.end - rows.begin, matrix == kMlpOut ? p_.mlp_width / p_.n_embd : 1,
                   [&](int row, float2 sum) { finish(matrix, rows.begin + row, sum, flag, last_step); });
  }

  // What becomes of the products of rows `row` and `row` + 1. Every warp has them, and writes a copy of its own.
  __device__ void finish(Matrix matrix, int row, float2 sum, unsigned flag, bool last_step) {
    const Exchange& to = p_.exchange;
    if (matrix == kQkv) {
      if (warp_ > 0) return;
      store_word(to.qkv + row, sum.x * factor_, flag);
      store_word(to.qkv + row + 1, sum.y * factor_, flag);
    } else if (matrix == kAttentionOut) {
      store_word(copy(to.y, warp_) + row / 2, pack(sum.x, sum.y), flag);
    } else if (matrix == kMlpIn) {
      const float a = fmaxf(sum.x * factor_, 0.0F), b = fmaxf(sum.y * factor_, 0.0F);
      store_word(copy(to.hidden, warp_) + row / 2, pack(a * a, b * b), flag);
    } else if (matrix == kMlpOut) {
      store_word(copy(to.y, warp_) + (p_.n_embd + row) / 2, pack(sum.x, sum.y), flag);
    } else if (warp_ == 0) {
      take_logit(row, sum.x * factor_, last_step);
      take_logit(row + 1, sum.y * factor_, last_step);
    }
  }

  __device__ void take_logit(int row, float logit, bool last_step) {
    if (p_.softcap > 0) logit = p_.softcap * tanhf(logit / p_.softcap);
    if (last_step) p_.logits[row] = logit;
    if (logit > best_ || best_row_ == p_.vocab) best_ = logit, best_row_ = row;
  }

  __device__ Word* copy(Word* words, int which) const { return words + which * p_.exchange.copy_stride; }
  // The copy that this block reads.
  __device__ const Word* own_copy(Word* words) const { return copy(words, static_cast<int>(blockIdx.x) % kCopies); }

  // The most likely token of all, the lowest of equals.
  __device__ int most_likely(float best, int row, unsigned flag) {
    __threadfence();  // the keys and values of this step come before the words below, behind which others read them
    reduce_best(best, row);
    if (thread_ < kCopies) {
      Word* mine = copy(p_.exchange.best, thread_) + 2 * blockIdx.x;
      store_word(mine, best, flag);
      store_word(mine + 1, static_cast<std::uint32_t>(row), flag);
    }
    best = -INFINITY;
    row = p_.vocab;
    if (thread_ < static_cast<int>(gridDim.x)) {
      const WordPair pair = await_pair(own_copy(p_.exchange.best) + 2 * thread_, flag);
      best = pair.first();
      row = static_cast<int>(static_cast<std::uint32_t>(pair.b));
    }
    reduce_best(best, row);
    return row;
  }

  // The best of all consumers' pairs, in every thread.
  __device__ void reduce_best(float& best, int& row) {
    const auto take = [&](float other, int other_row) {
      if (other > best || (other == best && other_row < row)) best = other, row = other_row;
    };
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const float other = __shfl_xor_sync(~0U, best, distance);
      take(other, __shfl_xor_sync(~0U, row, distance));
    }
    consumers_sync();  // what was there before has been read
    if (lane_ == 0) {
      memory_.best[warp_][0] = best;
      memory_.best[warp_][1] = __int_as_float(row);
    }
    consumers_sync();
    for (int i = 0; i < kConsumerWarps; ++i) take(memory_.best[i][0], __float_as_int(memory_.best[i][1]));
  }

  __device__ void attend_split(int layer, const LayerParams& w, const Splits& splits, int kv_head, int split,
                               unsigned flag) {
    AttentionMemory& memory = memory_.attention;
    const long long head = layer * p_.cache_layer + kv_head * p_.cache_head;
    const int begin = min(split * splits.length, splits.count), count = min(splits.length, splits.count - begin);
    const __nv_bfloat16* keys = p_.cache_k + head + static_cast<long long>(splits.first + begin) * kHeadDim;
    const __nv_bfloat16* values = p_.cache_v + head + static_cast<long long>(splits.first + begin) * kHeadDim;
    const bool has_new = split == splits.pieces - 1;
    KeyBlock block{};  // zeroed, or its registers would be taken all the time: a conditional load keeps what was there
    block.load(keys, values, count);
    const bool makes_key = has_new && warp_ == kConsumerWarps - 1, makes_value = has_new && warp_ == kConsumerWarps - 2;
    ValueEmbed embed{};
    if (makes_value && w.value_embed) embed = value_embed_of(w, kv_head);
    const int group = p_.n_head / p_.n_kv_head;
    const Word* raw = p_.exchange.qkv + kv_head * group * kHeadDim;
    const Word* raw_new = p_.exchange.qkv + (p_.n_head + (makes_value ? p_.n_kv_head : 0) + kv_head) * kHeadDim;
    HeadVector query, fresh;
    HeadVector::await_raw(query, raw, fresh, makes_key || makes_value ? raw_new : raw, flag);
    if (makes_key || makes_value) {
      const long long at = head + static_cast<long long>(position_) * kHeadDim;
      if (makes_key) {
        fresh.rotate_and_norm(rotary_, p_.norm_eps, p_.qk_scale);
        fresh.append(p_.cache_k + at);
        fresh.store(memory.key);
      } else {
        fresh.add(embed.gate, embed.row);
        fresh.append(p_.cache_v + at);
        fresh.store(memory.value);
      }
      __syncwarp();
    }
    for (int query_head = kv_head * group; query_head < (kv_head + 1) * group; ++query_head) {
      if (query_head > kv_head * group) {
        HeadVector::await_raw(query, p_.exchange.qkv + query_head * kHeadDim, fresh, raw, flag);
      }
      query.rotate_and_norm(rotary_, p_.norm_eps, p_.qk_scale);
      if (query_head > kv_head * group && count > kSplitKeys) block.load(keys, values, count);
      attend(memory, query, block, keys, values, count, has_new,
             p_.exchange.partial + (query_head * kMostSplits + split) * (kHeadDim / 2),
             p_.exchange.lse + query_head * kMostSplits + split, p_.exchange.copy_stride, flag);
    }
  }

  struct ValueEmbed {
    float gate;
    HeadVector row;
  };

  // Of x_shared_, the token and a KV head.
  __device__ ValueEmbed value_embed_of(const LayerParams& w, int kv_head) const {
    const auto* row = reinterpret_cast<const std::uint32_t*>(
        w.value_embed + (static_cast<long long>(token_) * p_.n_kv_head + kv_head) * kHeadDim);
    const std::uint32_t low = row[lane_], high = row[kHeadDim / 4 + lane_];
    float gate = 0;
    for (int channel = lane_; channel < p_.gate_channels; channel += 32) {
      gate += __bfloat162float(x_shared_[channel]) * w.ve_gate[kv_head * p_.gate_channels + channel];
    }
    return {p_.gate_scale * sigmoid(warp_sum(gate) * factor_), {unpack(low), unpack(high)}};
  }

  // The heads' outputs from their splits', bfloat16 into x_shared_. The quads of a warp are one head's 128 dims.
  __device__ void join_splits(int pieces, unsigned flag) {
    constexpr int kAtOnce = 8;
    Quad out[kQuads] = {};
    float weight[kQuads];  // lane s has that of split s
    for (int begin = 0; begin < pieces; begin += kAtOnce) {
      Word lse[kQuads] = {};
      WordPair parts[kQuads][kAtOnce] = {};
      bool all = false;
      while (!all) {
        all = true;
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          if (!has(i)) continue;
          const int head = warp_ + i * kConsumerWarps;
          const Word* from = own_copy(p_.exchange.partial) + (head * kMostSplits + begin) * (kHeadDim / 2) + 2 * lane_;
          if (begin == 0 && lane_ < pieces) lse[i] = load_word(own_copy(p_.exchange.lse) + head * kMostSplits + lane_);
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            if (begin + j < pieces) parts[i][j] = load_pair(from + j * (kHeadDim / 2));
          }
        }
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          if (!has(i)) continue;
          if (begin == 0 && lane_ < pieces) all = all && has_flag(lse[i], flag);
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            if (begin + j < pieces) all = all && parts[i][j].has(flag);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        if (!has(i)) continue;
        if (begin == 0) {
          const float own = lane_ < pieces ? value_of(lse[i]) : -INFINITY;
          weight[i] = exp2f(own - warp_max(own));
          weight[i] /= warp_sum(weight[i]);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          if (begin + j < pieces) {
            out[i].combine(1, __shfl_sync(~0U, weight[i], begin + j), Quad::unpacked(parts[i][j].bits()));
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (has(i)) reinterpret_cast<uint2*>(x_shared_)[thread_ + i * kConsumers] = out[i].packed();
    }
  }

  // x += y, when it is there
  __device__ void add(const Word* y, unsigned flag) {
    WordPair pairs[kQuads] = {};
    pause(kShortestWait);
    await_pairs<kQuads>(pairs, y, p_.n_embd / 2, thread_, kConsumers, flag);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (has(i)) x_[i].combine(1, 1, Quad::unpacked(pairs[i].bits()));
    }
  }

  __device__ void keep_middle() {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) middle_[i] = x_[i];
  }

  // x into x_shared_, not yet normed: products are multiplied by the factor that this returns.
  __device__ float share_normed() {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (!has(i)) continue;
      reinterpret_cast<uint2*>(x_shared_)[thread_ + i * kConsumers] = x_[i].packed();
      squares += x_[i].squares();
    }
    squares = warp_sum(squares);
    if (lane_ == 0) memory_.squares[warp_] = squares;
    consumers_sync();
    float total = 0;
#pragma unroll
    for (int i = 0; i < kConsumerWarps; ++i) total += memory_.squares[i];
    return inverse_norm(total);
  }

  __device__ void fetch_hidden(unsigned flag) {
    constexpr int kAtOnce = STEPS;  // 4 values a pair of words: all of an MLP of 4 * n_embd
    for (int begin = 0; begin < p_.mlp_width / 2; begin += 2 * kAtOnce * kConsumers) {
      WordPair pairs[kAtOnce] = {};
      await_pairs<kAtOnce>(pairs, own_copy(p_.exchange.hidden) + begin, p_.mlp_width / 2 - begin, thread_, kConsumers,
                           flag);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int word = begin + 2 * (thread_ + i * kConsumers);
        if (word < p_.mlp_width / 2) {
          reinterpret_cast<uint2*>(hidden_)[word / 2] = pairs[i].bits();
        }
      }
    }
    consumers_sync();
  }

  __device__ float inverse_norm(float squares) const { return rsqrtf(squares * p_.inverse_width + p_.norm_eps); }

  const DecodeParams& p_;
  BlockMemory& memory_;
  __nv_bfloat16 *x_shared_, *hidden_;
  RingReader ring_;
  const int thread_ = static_cast<int>(threadIdx.x), warp_ = thread_ / 32, lane_ = thread_ % 32;
  unsigned sums_turn_ = 0, first_flag_ = 0;
  float factor_ = 0;  // of the norm of what is in x_shared_
  float best_ = 0;    // of this thread's logits
  int best_row_ = 0;
  int position_ = 0, token_ = 0;
  Rotary rotary_;
  Quad x_[kQuads], x0_[kQuads], middle_[kQuads];  // the residual stream, the embedding, the layer to back out
};

template <int STEPS>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  BlockMemory& memory = *reinterpret_cast<BlockMemory*>(shared);
  unsigned char* ring = shared + ring_offset(p.n_embd, p.mlp_width);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kEntries; ++i) {
      init_barrier(&memory.barriers.full[i], 1);
      init_barrier(&memory.barriers.empty[i], kConsumerWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
  }
  for (int i = static_cast<int>(threadIdx.x); i < p.n_layer; i += kThreads) memory.layers[i] = p.layers[i];
  if (threadIdx.x < kMatrices) {
    const int rows[] = {(p.n_head + 2 * p.n_kv_head) * kHeadDim, p.n_embd, p.mlp_width, p.n_embd, p.vocab};
    // Not the same seat for each, so that no block has the larger share of all.
    const int blocks = static_cast<int>(gridDim.x);
    const int seat = (static_cast<int>(blockIdx.x) + 37 * static_cast<int>(threadIdx.x)) % blocks;
    memory.shares[threadIdx.x] = share(rows[threadIdx.x], seat, blocks);
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    produce(p, memory, ring);
  } else {
    Consumer<STEPS>(p, memory, shared + vectors_offset(), ring).run();
  }
}

}  // namespace nanochat_x::cuda
