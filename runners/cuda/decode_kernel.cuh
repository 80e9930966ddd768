#pragma once

// Whole steps of decoding in one launch: a block on each multiprocessor, all of them resident. A step is 5 products a
// layer, each spread over all blocks, and what lies between them, which every block computes for itself: the residual
// stream is in every block's registers, thread t has elements 2 (t + 256 i) and the one behind.

#include <cuda_bf16.h>

#include <cstdint>

#include "attend.cuh"
#include "exchange.cuh"
#include "product.cuh"
#include "ring.cuh"

namespace nanochat_x::cuda {

// What a block keeps in shared memory in front of the ring.
struct BlockMemory {
  Barriers barriers;
  Sums sums;
  AttentionMemory attention;
  float embedding[kConsumerWarps][4], best[kConsumerWarps][2];
  float squares[kConsumerWarps];
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
__device__ inline void prefetch_split(const DecodeParams& p, int layer, int own, const Splits& splits) {
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
  RingWriter ring(&memory.barriers, ring_memory, p.slots, 2 * p.n_embd);
  const int blocks = static_cast<int>(gridDim.x), queries = p.n_head * kHeadDim, keys = p.n_kv_head * kHeadDim;
  const long long c = p.n_embd;
  const int position = p.state->position;
  for (int step = 0; step < p.steps; ++step) {
    for (int layer = 0; layer < p.n_layer; ++layer) {
      const LayerParams& w = p.layers[layer];
      const int own = seat(layer);
      prefetch_split(p, layer, own, Splits(position + step, w.window, most_splits(p)));
      stream(ring, share(queries + 2 * keys, own, blocks), 1, p.n_embd, [&](int row) {
        if (row < queries) return w.c_q + row * c;
        return row < queries + keys ? w.c_k + (row - queries) * c : w.c_v + (row - queries - keys) * c;
      });
      stream(ring, share(p.n_embd, own, blocks), 1, p.n_embd, [&](int row) { return w.c_proj + row * c; });
      stream(ring, share(p.mlp_width, own, blocks), 1, p.n_embd, [&](int row) { return w.c_fc + row * c; });
      stream(ring, share(p.n_embd, own, blocks), p.mlp_width / p.n_embd, p.n_embd,
             [&](int row) { return w.mlp_c_proj + row * static_cast<long long>(p.mlp_width); });
    }
    stream(ring, share(p.vocab, seat(p.n_layer), blocks), 1, p.n_embd, [&](int row) { return p.lm_head + row * c; });
  }
}

// --- the consumers

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
      for (int layer = 0; layer < p_.n_layer; ++layer) run_layer(layer);
      const int drawn = run_head(step == p_.steps - 1);
      if (blockIdx.x == 0 && thread_ == 0) p_.drawn[step] = drawn;
      previous = token;
      token = p_.forced && step + 1 < p_.steps ? p_.forced[step + 1] : drawn;
    }
    // All blocks have read the state: this one has had words of the last step from each of them.
    if (blockIdx.x == 0 && thread_ == 0) *p_.state = {token, previous, begin + p_.steps};
  }

 private:
  static constexpr int kPairs = (STEPS + 1) / 2;  // of elements of the residual stream, in a thread

  __device__ bool has(int i) const { return 2 * (thread_ + i * kConsumers) < p_.n_embd; }

  // x = norm(wte[token]), with a share of the normed row of the token before
  __device__ void embed(int token, int previous) {
    const auto* row = reinterpret_cast<const std::uint32_t*>(p_.wte + static_cast<long long>(token) * p_.n_embd);
    const auto* before = reinterpret_cast<const std::uint32_t*>(p_.wte + static_cast<long long>(previous) * p_.n_embd);
    const bool smear = p_.smear_channels > 0 && position_ > 0;
    rotary_ = {reinterpret_cast<const float2*>(p_.cos + static_cast<long long>(position_) * (kHeadDim / 2))[lane_],
               reinterpret_cast<const float2*>(p_.sin + static_cast<long long>(position_) * (kHeadDim / 2))[lane_]};
    float2 old[kPairs] = {};
    float squares = 0, old_squares = 0, gate = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      x_[i] = make_float2(0, 0);
      if (!has(i)) continue;
      const int pair = thread_ + i * kConsumers;
      x_[i] = unpack(row[pair]);
      squares += x_[i].x * x_[i].x + x_[i].y * x_[i].y;
      if (!smear) continue;
      old[i] = unpack(before[pair]);
      old_squares += old[i].x * old[i].x + old[i].y * old[i].y;
      if (2 * pair < p_.smear_channels) gate += x_[i].x * p_.smear_gate[2 * pair];
      if (2 * pair + 1 < p_.smear_channels) gate += x_[i].y * p_.smear_gate[2 * pair + 1];
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
    for (int i = 0; i < kPairs; ++i) {
      x_[i] = make_float2(x_[i].x * factor + share * old[i].x, x_[i].y * factor + share * old[i].y);
      x0_[i] = middle_[i] = x_[i];
    }
  }

  __device__ void run_layer(int layer) {
    const LayerParams& w = p_.layers[layer];
    const int own = seat(layer), blocks = static_cast<int>(gridDim.x);
    const unsigned flag = first_flag_ + static_cast<unsigned>(layer);
    const int queries = p_.n_head * kHeadDim, keys = p_.n_kv_head * kHeadDim;
    const Splits splits(position_, w.window, most_splits(p_));

    if (layer > 0) add(p_.exchange.y + p_.n_embd, flag - 1);
    if (layer > 0 && layer - 1 == p_.backout_layer) keep_middle();
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      x_[i] = make_float2(w.resid_lambda * x_[i].x + w.x0_lambda * x0_[i].x,
                          w.resid_lambda * x_[i].y + w.x0_lambda * x0_[i].y);
    }
    const float factor = share_normed();
    const Share qkv = share(queries + 2 * keys, own, blocks);
    multiply_rows(x_shared_, qkv, 1,
                  [&](int row, float sum) { store_word(p_.exchange.qkv + row, sum * factor, flag); });
    if (own < p_.n_kv_head * splits.pieces) {
      attend_split(layer, w, splits, own / splits.pieces, own % splits.pieces, factor, flag);
    }
    join_splits(splits.pieces, flag);
    consumers_sync();
    multiply_rows(x_shared_, share(p_.n_embd, own, blocks), 1,
                  [&](int row, float sum) { store_word(p_.exchange.y + row, sum, flag); });
    add(p_.exchange.y, flag);
    const float mlp_factor = share_normed();
    multiply_rows(x_shared_, share(p_.mlp_width, own, blocks), 1, [&](int row, float sum) {
      const float inside = fmaxf(sum * mlp_factor, 0.0F);
      const float squared = inside * inside;
      // rows come in pairs, an even one in an even lane
      const float next = __shfl_down_sync(__activemask(), squared, 1);
      if (row % 2 == 0) store_word(p_.exchange.hidden + row / 2, pack(squared, next), flag);
    });
    fetch_hidden(flag);
    multiply_rows(hidden_, share(p_.n_embd, own, blocks), p_.mlp_width / p_.n_embd,
                  [&](int row, float sum) { store_word(p_.exchange.y + p_.n_embd + row, sum, flag); });
  }

  // Logits of this block's rows; returns the most likely token, the lowest of equals.
  __device__ int run_head(bool last_step) {
    const unsigned flag = first_flag_ + static_cast<unsigned>(p_.n_layer);
    add(p_.exchange.y + p_.n_embd, flag - 1);
    if (p_.backout_layer == p_.n_layer - 1) keep_middle();
    if (p_.backout_layer >= 0) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        x_[i] = make_float2(x_[i].x - p_.backout_lambda * middle_[i].x, x_[i].y - p_.backout_lambda * middle_[i].y);
      }
    }
    const float factor = share_normed();
    float best = -INFINITY;
    int best_row = p_.vocab;
    multiply_rows(x_shared_, share(p_.vocab, seat(p_.n_layer), static_cast<int>(gridDim.x)), 1,
                  [&](int row, float sum) {
                    float logit = sum * factor;
                    if (p_.softcap > 0) logit = p_.softcap * tanhf(logit / p_.softcap);
                    if (last_step) p_.logits[row] = logit;
                    if (logit > best || best_row == p_.vocab) best = logit, best_row = row;
                  });
    return most_likely(best, best_row, flag);
  }

  __device__ int most_likely(float best, int row, unsigned flag) {
    reduce_best(best, row);
    if (thread_ == 0) {
      Word* mine = p_.exchange.best + 2 * blockIdx.x;
      store_word(mine, best, flag);
      store_word(mine + 1, static_cast<std::uint32_t>(row), flag);
    }
    best = -INFINITY;
    row = p_.vocab;
    if (thread_ < static_cast<int>(gridDim.x)) {
      const WordPair pair = await_pair(p_.exchange.best + 2 * thread_, flag);
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
                               float factor, unsigned flag) {
    AttentionMemory& memory = memory_.attention;
    const long long head = layer * p_.cache_layer + kv_head * p_.cache_head;
    const int begin = min(split * splits.length, splits.count), count = min(splits.length, splits.count - begin);
    const __nv_bfloat16* keys = p_.cache_k + head + static_cast<long long>(splits.first + begin) * kHeadDim;
    const __nv_bfloat16* values = p_.cache_v + head + static_cast<long long>(splits.first + begin) * kHeadDim;
    const bool has_new = split == splits.pieces - 1;
    KeyBlock block;
    block.load(keys, values, count);
    const Word* raw_keys = p_.exchange.qkv + (p_.n_head + kv_head) * kHeadDim;
    if (has_new && warp_ >= kConsumerWarps - 2) {
      const long long at = head + static_cast<long long>(position_) * kHeadDim;
      if (warp_ == kConsumerWarps - 1) {
        HeadVector key = HeadVector::await_raw(raw_keys, flag);
        key.rotate_and_norm(rotary_, p_.norm_eps, p_.qk_scale);
        key.append(p_.cache_k + at);
        key.store(memory.key);
      } else {
        HeadVector value = HeadVector::await_raw(raw_keys + p_.n_kv_head * kHeadDim, flag);
        if (w.value_embed) add_value_embed(value, w, kv_head, factor);
        value.append(p_.cache_v + at);
        value.store(memory.value);
      }
      __syncwarp();
    }
    const int group = p_.n_head / p_.n_kv_head;
    for (int query_head = kv_head * group; query_head < (kv_head + 1) * group; ++query_head) {
      HeadVector query = HeadVector::await_raw(p_.exchange.qkv + query_head * kHeadDim, flag);
      query.rotate_and_norm(rotary_, p_.norm_eps, p_.qk_scale);
      if (query_head > kv_head * group && count > kSplitKeys) block.load(keys, values, count);
      attend(memory, query, block, keys, values, count, has_new,
             p_.exchange.partial + query_head * (kHeadDim / 2) * kMostSplits + split,
             p_.exchange.lse + query_head * kMostSplits + split, flag);
    }
    if (has_new && warp_ >= kConsumerWarps - 2) __threadfence();  // the next step's readers come after this
  }

  __device__ void add_value_embed(HeadVector& value, const LayerParams& w, int kv_head, float factor) const {
    float gate = 0;
    for (int channel = lane_; channel < p_.gate_channels; channel += 32) {
      gate += __bfloat162float(x_shared_[channel]) * w.ve_gate[kv_head * p_.gate_channels + channel];
    }
    gate = p_.gate_scale * sigmoid(warp_sum(gate) * factor);
    const auto* row = reinterpret_cast<const std::uint32_t*>(
        w.value_embed + (static_cast<long long>(token_) * p_.n_kv_head + kv_head) * kHeadDim);
    const float2 a = unpack(row[lane_]), b = unpack(row[kHeadDim / 4 + lane_]);
    value.a = make_float2(value.a.x + gate * a.x, value.a.y + gate * a.y);
    value.b = make_float2(value.b.x + gate * b.x, value.b.y + gate * b.y);
  }

  // The heads' outputs from their splits', bfloat16 into x_shared_.
  __device__ void join_splits(int pieces, unsigned flag) {
    constexpr int kAtOnce = 4;
    float2 out[kPairs] = {};
    float largest[kPairs], total[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) largest[i] = -INFINITY, total[i] = 0;
    for (int begin = 0; begin < pieces; begin += kAtOnce) {
      WordPair parts[kPairs][kAtOnce / 2], lses[kPairs][kAtOnce / 2];
      bool all = false;
      while (!all) {
        all = true;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          if (!has(i)) continue;
          const int pair = thread_ + i * kConsumers;
#pragma unroll
          for (int j = 0; j < kAtOnce / 2; ++j) {
            if (begin + 2 * j < pieces) {
              parts[i][j] = load_pair(p_.exchange.partial + pair * kMostSplits + begin + 2 * j);
              lses[i][j] = load_pair(p_.exchange.lse + pair / (kHeadDim / 2) * kMostSplits + begin + 2 * j);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          if (!has(i)) continue;
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            if (begin + j < pieces) {
              all = all && flag_of(parts[i][j / 2], j % 2) == flag && flag_of(lses[i][j / 2], j % 2) == flag;
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (!has(i)) continue;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          if (begin + j < pieces) {
            const float lse = value_of(lses[i][j / 2], j % 2);
            const float2 part = unpack(__float_as_uint(value_of(parts[i][j / 2], j % 2)));
            const float top = fmaxf(largest[i], lse);
            const float fade = exp2f(largest[i] - top), weight = exp2f(lse - top);
            out[i] = make_float2(out[i].x * fade + weight * part.x, out[i].y * fade + weight * part.y);
            total[i] = total[i] * fade + weight;
            largest[i] = top;
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (!has(i)) continue;
      reinterpret_cast<std::uint32_t*>(x_shared_)[thread_ + i * kConsumers] =
          pack(out[i].x / total[i], out[i].y / total[i]);
    }
  }

  __device__ static unsigned flag_of(const WordPair& pair, int which) {
    return static_cast<unsigned>((which == 0 ? pair.a : pair.b) >> 32U);
  }
  __device__ static float value_of(const WordPair& pair, int which) { return which == 0 ? pair.first() : pair.second(); }

  // x += y, when it is there
  __device__ void add(const Word* y, unsigned flag) {
    WordPair pairs[kPairs];
    await_pairs<kPairs>(pairs, y, p_.n_embd, thread_, kConsumers, flag);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (has(i)) x_[i] = make_float2(x_[i].x + pairs[i].first(), x_[i].y + pairs[i].second());
    }
  }

  __device__ void keep_middle() {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) middle_[i] = x_[i];
  }

  // x into x_shared_, not yet normed: products are multiplied by the factor that this returns.
  __device__ float share_normed() {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (!has(i)) continue;
      reinterpret_cast<std::uint32_t*>(x_shared_)[thread_ + i * kConsumers] = pack(x_[i].x, x_[i].y);
      squares += x_[i].x * x_[i].x + x_[i].y * x_[i].y;
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
      WordPair pairs[kAtOnce];
      await_pairs<kAtOnce>(pairs, p_.exchange.hidden + begin, p_.mlp_width / 2 - begin, thread_, kConsumers, flag);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int word = begin + 2 * (thread_ + i * kConsumers);
        if (word < p_.mlp_width / 2) {
          reinterpret_cast<uint2*>(hidden_)[word / 2] =
              make_uint2(static_cast<std::uint32_t>(pairs[i].a), static_cast<std::uint32_t>(pairs[i].b));
        }
      }
    }
    consumers_sync();
  }

  template <typename Finish>
  __device__ void multiply_rows(const __nv_bfloat16* x, Share rows, int chunks, Finish finish) {
    product<STEPS>(ring_, memory_.sums, sums_turn_, x, p_.n_embd, rows.end - rows.begin, chunks,
                   [&](int row, float sum) { finish(rows.begin + row, sum); });
  }

  __device__ float inverse_norm(float squares) const {
    return rsqrtf(squares / static_cast<float>(p_.n_embd) + p_.norm_eps);
  }
  __device__ static float sigmoid(float x) { return 1 / (1 + expf(-x)); }

  const DecodeParams& p_;
  BlockMemory& memory_;
  __nv_bfloat16 *x_shared_, *hidden_;
  RingReader ring_;
  const int thread_ = static_cast<int>(threadIdx.x), warp_ = thread_ / 32, lane_ = thread_ % 32;
  unsigned sums_turn_ = 0, first_flag_ = 0;
  int position_ = 0, token_ = 0;
  Rotary rotary_;
  float2 x_[kPairs], x0_[kPairs], middle_[kPairs];  // the residual stream, the embedding, the layer to back out
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
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    produce(p, memory, ring);
  } else {
    Consumer<STEPS>(p, memory, shared + vectors_offset(), ring).run();
  }
}

}  // namespace nanochat_x::cuda
