#pragma once

// Whole steps of decoding in one launch: a block on each multiprocessor, all of them resident, in clusters of eight. A
// cluster computes some heads and a part of the MLP's inside of each layer, from the normed stream to what they add to
// it; its blocks tell each other the rest through shared memory. What clusters add is exchanged twice a layer
// (exchange.cuh): the block of rank r of each cluster adds up the r-th eighth of the residual stream, keeps it in
// registers, an element a lane, and gives it to the other ranks.
//
// One row, or up to four (a batch), which read the weights once: products take all of them at no more cost, each
// message has all of them, and attention takes them one after the other.

#include <cuda_bf16.h>

#include <cstdint>

#include "attend.cuh"
#include "cluster.cuh"
#include "exchange.cuh"
#include "producer.cuh"
#include "product_packed.cuh"
#include "sums.cuh"
#include "vector.cuh"

namespace nanochat_x::cuda {

// What a block keeps in shared memory in front of what `BlockLayout` tells.
struct BlockMemory {
  Barriers barriers;
  std::uint64_t inboxes[5];  // the barriers of what blocks of a cluster send each other
  AttentionMemory attention;
  alignas(16) unsigned char outgoing[kConsumerWarps][4 * kGroup];  // what each warp is about to send
  float norm_factor[kMostRows];
  DecodeState rows[kMostRows];
  float embedding[kConsumerWarps][4], best[kConsumerWarps][2];
  LayerParams layers[kMostLayers];
};

__device__ inline BlockMemory& block_memory() { return *reinterpret_cast<BlockMemory*>(shared_memory); }

// ROWS: 1, or kMostRows for any number up to it.
template <WeightFormat FORMAT, int GROUPS, int ROWS>
class Consumer {
 public:
  explicit __device__ Consumer(const DecodeParams& params)
      : p_(params),
        ring_(&block_memory().barriers, params.layout.ring, params.layout.ring_bytes),
        share_(params.shares[blockIdx.x / kRanks]),
        group_(params.n_head / params.n_kv_head) {}

  __device__ void open_inboxes() const {
    x_inbox(false).open();
    x_inbox(true).open();
    qkv_inbox().open();
    parts_inbox().open();
    hidden_inbox().open();
  }

  __device__ void run() {
    if (thread_ < rows()) {
      state(thread_) = p_.state[thread_];
      if (p_.forced) state(thread_).token = p_.forced[thread_];
    }
    consumers_sync();
    for (int step = 0; step < p_.steps; ++step) {
      // Keys that other blocks appended in the steps before are read below.
      __threadfence();
      first_flag_ = p_.first_flag + static_cast<unsigned>(step) * static_cast<unsigned>(p_.n_layer + 1);
      if (ROWS == 1) only_ = state(0);
      for (int row = 0; row < rows(); ++row) embed(row);
      best_ = -INFINITY;
      best_row_ = p_.vocab;
      // One loop for all products: the instructions of several would not fit into the instruction cache.
      for (int half = 0; half <= 2 * p_.n_layer; ++half) run_half(half, step == p_.steps - 1);
      tell_most_likely(first_flag_ + static_cast<unsigned>(p_.n_layer));
      for (int row = 0; row < rows(); ++row) {
        const int drawn = most_likely(row, first_flag_ + static_cast<unsigned>(p_.n_layer));
        if (thread_ != 0) continue;
        if (blockIdx.x == 0) p_.drawn[step * rows() + row] = drawn;
        const int next = p_.forced && step + 1 < p_.steps ? p_.forced[(step + 1) * rows() + row] : drawn;
        state(row) = {next, state(row).token, state(row).position + 1};
      }
      consumers_sync();
    }
    // All blocks have read the state: this one has had words of the last step from each of them.
    if (blockIdx.x == 0 && thread_ < rows()) p_.state[thread_] = state(thread_);
  }

 private:
  __device__ int rows() const { return ROWS == 1 ? 1 : p_.rows; }
  // In shared memory; what is fed in this step.
  __device__ DecodeState& state(int row) const { return block_memory().rows[row]; }
  __device__ int position(int row) const { return ROWS == 1 ? only_.position : state(row).position; }
  __device__ int token(int row) const { return ROWS == 1 ? only_.token : state(row).token; }
  __device__ Rotary& rotary(int row) const {
    return reinterpret_cast<Rotary*>(shared_memory + p_.layout.rotary + row * kRotaryBytes)[lane_];
  }
  __device__ Sums sums() const { return {p_.layout.sums, rows()}; }

  // x is of attention and head, and of the MLP. Each of these is that of the first row.
  __device__ Vector x(bool is_mlp) const { return {is_mlp ? p_.layout.mlp_x : p_.layout.x, p_.n_embd}; }
  __device__ Vector attended() const { return {p_.layout.attended, share_.kv_heads() * group_ * kHeadDim}; }
  __device__ Vector hidden() const { return {p_.layout.hidden, share_.hidden()}; }
  __device__ float* qkv() const { return reinterpret_cast<float*>(shared_memory + p_.layout.qkv); }
  // [rows, heads, ranks, 128], and behind them weights [rows, heads, ranks]
  __device__ float* parts() const { return reinterpret_cast<float*>(shared_memory + p_.layout.parts); }
  __device__ float* weights() const { return parts() + rows() * group_ * kRanks * kHeadDim; }
  __device__ Inbox x_inbox(bool is_mlp) const {
    return Inbox(&block_memory().inboxes[is_mlp], rows() * vector_bytes(p_.n_embd));
  }
  __device__ Inbox qkv_inbox() const { return Inbox(&block_memory().inboxes[2], rows() * 4 * (group_ + 2) * kHeadDim); }
  __device__ Inbox parts_inbox() const {
    return Inbox(&block_memory().inboxes[3], rows() * 4 * kRanks * group_ * (kHeadDim + 1));
  }
  __device__ Inbox hidden_inbox() const {
    return Inbox(&block_memory().inboxes[4], rows() * vector_bytes(share_.hidden()));
  }

  // Groups of the residual stream, of all rows, are dealt out to warps; the i-th one of this warp, if it has so many.
  struct Unit {
    int row, group;  // of the rank's
    bool there;
  };
  __device__ Unit unit(int i) const {
    const int groups = max(own_.count() / kGroup, 1), which = warp_ + i * kConsumerWarps,
              row = ROWS == 1 ? 0 : which / groups;
    return {row, which - row * groups, which < rows() * own_.count() / kGroup};
  }
  // The lane's column of it, as `sum_over_clusters` leaves it.
  __device__ int column() const { return 4 * (lane_ % 8) + lane_ / 16 * 2 + lane_ / 8 % 2; }

  // x = norm(wte[token]), with a share of the normed row of the token before
  __device__ void embed(int which) {
    const __nv_bfloat16* row = p_.wte + static_cast<long long>(token(which)) * p_.n_embd;
    const __nv_bfloat16* before = p_.wte + static_cast<long long>(state(which).previous) * p_.n_embd;
    const bool smear = p_.smear_channels > 0 && position(which) > 0;
    if (warp_ == 0) {
      const long long row_at = static_cast<long long>(position(which)) * (kHeadDim / 2);
      rotary(which) = {reinterpret_cast<const float2*>(p_.cos + row_at)[lane_],
                       reinterpret_cast<const float2*>(p_.sin + row_at)[lane_]};
    }
    float squares = 0, old_squares = 0, gate = 0;
    for (int pair = thread_; pair < p_.n_embd / 2; pair += kConsumers) {
      const float2 two = unpack(reinterpret_cast<const std::uint32_t*>(row)[pair]);
      squares += two.x * two.x + two.y * two.y;
      if (!smear) continue;
      const float2 old = unpack(reinterpret_cast<const std::uint32_t*>(before)[pair]);
      old_squares += old.x * old.x + old.y * old.y;
      if (2 * pair < p_.smear_channels) gate += two.x * p_.smear_gate[2 * pair];
      if (2 * pair + 1 < p_.smear_channels) gate += two.y * p_.smear_gate[2 * pair + 1];
    }
    squares = warp_sum(squares);
    old_squares = warp_sum(old_squares);
    gate = warp_sum(gate);
    if (lane_ == 0) {
      block_memory().embedding[warp_][0] = squares;
      block_memory().embedding[warp_][1] = old_squares;
      block_memory().embedding[warp_][2] = gate;
    }
    consumers_sync();
    float sums[3] = {};
    for (int i = 0; i < kConsumerWarps; ++i) {
#pragma unroll
      for (int j = 0; j < 3; ++j) sums[j] += block_memory().embedding[i][j];
    }
    const float factor = inverse_norm(sums[0]), old_factor = inverse_norm(sums[1]);
    const float share = smear ? p_.smear_lambda * sigmoid(sums[2] * factor) * old_factor : 0.0F;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const Unit own = unit(i);
      if (!own.there || own.row != which) continue;
      const int at = own_.begin + kGroup * own.group + column();
      element_[i] = factor * __bfloat162float(row[at]) + share * __bfloat162float(before[at]);
      embedded_[i] = middle_[i] = element_[i];
    }
    if (which + 1 < rows()) consumers_sync();  // sums have been read
  }

  // Attention, the MLP or, behind all layers, the head.
  __device__ void run_half(int half, bool last_step) {
    const int layer = half / 2;
    const bool is_head = layer == p_.n_layer, is_mlp = half % 2 != 0;
    const LayerParams& w = block_memory().layers[min(layer, p_.n_layer - 1)];
    const unsigned flag = first_flag_ + static_cast<unsigned>(layer);
    if (!is_mlp && !is_head && share_.kv_heads() > 0) {
      value_row_ = value_row_of(w, share_.kv_begin);
      load_first(first_key_, p_.cache_k, layer, w, share_.kv_begin);
      if (!kValuesLater) load_first(first_value_, p_.cache_v, layer, w, share_.kv_begin);
    }
    refresh_x(w, layer, is_mlp, is_head, flag);
    if (kValuesLater && !is_mlp && !is_head && share_.kv_heads() > 0) {
      load_first(first_value_, p_.cache_v, layer, w, share_.kv_begin);
    }
    const Vector x = this->x(is_mlp);
    const int rounds = is_head || is_mlp ? 1 : share_.kv_heads();
    const Tiles tiles = is_head ? head_tiles(p_.vocab) : Tiles{};
    const int rows = is_head  ? min(tiles.end * kHeadTile, p_.vocab) - tiles.begin * kHeadTile
                     : is_mlp ? share_.hidden() / kRanks
                              : (group_ + 2) * kRankRows;
    for (int round = 0; round < rounds; ++round) {
      Product<FORMAT>::template wide<GROUPS, ROWS>(
          ring_, sums(), sums_turn_, x, p_.n_embd, rows, [&] { take_norm(x); },
          [&](int which, int row, float sum) {
            sum *= block_memory().norm_factor[which];
            if (is_head) {
              if (row < rows) take_logit(which, tiles.begin * kHeadTile + row, sum, last_step);
            } else if (is_mlp) {
              if (row < rows) send_hidden(which, row, sum);
            } else {
              send_qkv(which, row, rows, sum);
            }
          });
      if (!is_head && !is_mlp) attend_round(layer, w, share_.kv_begin + round, round);
    }
    if (is_head || rounds == 0) return;
    if (is_mlp) hidden_inbox().await(mlp_turn_++);
    Product<FORMAT>::template narrow<ROWS>(
        ring_, is_mlp ? hidden() : attended(), is_mlp ? share_.hidden() : share_.kv_heads() * group_ * kHeadDim,
        own_.count(), this->rows(),
        (is_mlp ? mlp_words(layer) : p_.exchange.attention) + (cluster_ * p_.n_embd + own_.begin) / 4, row_words(),
        flag);
  }

  __device__ int row_words() const { return kMostClusters * (p_.n_embd / 4); }
  __device__ uint4* mlp_words(int layer) const { return p_.exchange.mlp + layer % 2 * kMostRows * row_words(); }

  // This rank's part of the residual stream, with what the half before has added; all ranks' then is in x(is_mlp),
  // not yet normed: products are multiplied by a factor.
  __device__ void refresh_x(const LayerParams& w, int layer, bool is_mlp, bool is_head, unsigned flag) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const Unit own = unit(i);
      if (!own.there) continue;
      const int words = ROWS == 1 ? 0 : own.row * row_words();
      float& element = element_[i];
      if (is_mlp) {
        element += sum_over_clusters(p_.exchange.attention + words, own.group, p_.attention_clusters, flag);
      } else if (layer > 0) {
        element += sum_over_clusters(mlp_words(layer - 1) + words, own.group, p_.clusters, flag - 1);
        if (layer - 1 == p_.backout_layer) middle_[i] = element;
      }
      if (is_head) {
        if (p_.backout_layer >= 0) element -= p_.backout_lambda * middle_[i];
      } else if (!is_mlp) {
        element = w.resid_lambda * element + w.x0_lambda * embedded_[i];
      }
      const float squares = warp_sum(element * element);
      send_group(x_inbox(is_mlp), x(is_mlp).row(own.row), own_.begin / kGroup + own.group, column(), element, squares);
    }
    x_inbox(is_mlp).await(is_mlp ? mlp_turn_ : x_turn_++);
  }

  // Of four words of each cluster, the total of that sum which is the lane's.
  __device__ float sum_over_clusters(const uint4* words, int group, int clusters, unsigned flag) const {
    constexpr int kSources = kMostClusters / 4;  // of a lane
    const int first = lane_ / 8 * kSources, stride = p_.n_embd / 4;
    words += first * stride + (own_.begin + kGroup * group) / 4 + lane_ % 8;
    uint4 found[kSources];
    bool there[kSources];
#pragma unroll
    for (int i = 0; i < kSources; ++i) {
      found[i] = make_uint4(0, 0, 0, 0);
      there[i] = first + i >= clusters;
    }
    bool all = false;
    while (!all) {
#pragma unroll
      for (int i = 0; i < kSources; ++i) {
        if (!there[i]) found[i] = load_sums(words + i * stride);
      }
      all = true;
#pragma unroll
      for (int i = 0; i < kSources; ++i) {
        there[i] = there[i] || found[i].w == flag;
        all = all && there[i];
      }
    }
    __syncwarp();
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < kSources; ++i) {
      const float4 four = sums_of(found[i]);
      sum = make_float4(sum.x + four.x, sum.y + four.y, sum.z + four.z, sum.w + four.w);
    }
    const bool upper = lane_ & 16, odd = lane_ & 8;
    const float even_one = (upper ? sum.z : sum.x) + __shfl_xor_sync(~0U, upper ? sum.x : sum.z, 16);
    const float odd_one = (upper ? sum.w : sum.y) + __shfl_xor_sync(~0U, upper ? sum.y : sum.w, 16);
    return (odd ? odd_one : even_one) + __shfl_xor_sync(~0U, odd ? even_one : odd_one, 8);
  }

  // A group of a vector, a column a lane, to all ranks.
  __device__ void send_group(const Inbox& inbox, const Vector& to, int group, int column, float value, float squares) {
    unsigned char* mine = block_memory().outgoing[warp_];
    __syncwarp();  // what was sent before has been read
    GroupInfo info = write_column<FORMAT>(mine, column, value);
    info.squares = squares;
    __syncwarp();
    inbox.send(to.group(group) + 16 * (lane_ % 4), *reinterpret_cast<const uint4*>(mine + 16 * (lane_ % 4)), lane_ / 4);
    if (lane_ < kRanks) {
      inbox.send(
          &to.info(group),
          make_uint4(__float_as_uint(info.step), static_cast<unsigned>(info.sum), __float_as_uint(info.squares), 0),
          lane_);
    }
  }

  // 32 floats, one a lane, of which 4 that lie together go to at(first of them), to all ranks.
  template <typename At>
  __device__ void send_floats(const Inbox& inbox, float value, int count, At at) {
    auto* mine = reinterpret_cast<float*>(block_memory().outgoing[warp_]);
    __syncwarp();
    mine[lane_] = value;
    __syncwarp();
    const int first = 4 * (lane_ % 8);
    if (first >= count) return;
    const uint4 four = *reinterpret_cast<const uint4*>(mine + first);
    inbox.send(at(first), four, lane_ / 8);
    inbox.send(at(first), four, lane_ / 8 + kRanks / 2);
  }

  // In the last warp, while the others multiply: by what products of x are to be multiplied.
  __device__ void take_norm(const Vector& x) {
    for (int row = 0; row < rows(); ++row) {
      float squares = 0;
      for (int group = lane_; group < p_.n_embd / kGroup; group += 32) squares += x.row(row).info(group).squares;
      const float factor = inverse_norm(warp_sum(squares));
      if (lane_ == 0) block_memory().norm_factor[row] = factor;
    }
  }

  __device__ void send_qkv(int which, int row, int rows, float sum) {
    const int begin = row - lane_;  // the warp's first
    send_floats(qkv_inbox(), sum, rows - begin, [&](int first) {
      const int at = begin + first;
      return qkv() + (which * (group_ + 2) + at / kRankRows) * kHeadDim + rank_ * kRankRows + at % kRankRows;
    });
  }

  __device__ void send_hidden(int which, int row, float sum) {
    const float positive = fmaxf(sum, 0.0F);
    send_group(hidden_inbox(), hidden().row(which), (rank_ * (share_.hidden() / kRanks) + row) / kGroup, lane_,
               positive * positive, 0);
  }

  __device__ void take_logit(int which, int row, float logit, bool last_step) {
    if (p_.softcap > 0) logit = p_.softcap * tanhf(logit / p_.softcap);
    if (last_step) p_.logits[which * p_.vocab + row] = logit;
    if (logit > best_ || best_row_ == p_.vocab) best_ = logit, best_row_ = row;
  }

  __device__ Word* best_words(int row) const { return p_.exchange.best + 2 * static_cast<int>(gridDim.x) * row; }

  // The most likely tokens of this block's, to all others.
  __device__ void tell_most_likely(unsigned flag) {
    __threadfence();  // the keys and values of this step come before the words below, behind which others read them
    for (int row = 0; row < rows(); ++row) {
      const bool has_logits = ROWS == 1 || thread_ / kPassRows == row;  // as products are finished
      float best = has_logits ? best_ : -INFINITY;
      int token = has_logits ? best_row_ : p_.vocab;
      reduce_best(best, token);
      if (thread_ == 0) {
        Word* mine = best_words(row) + 2 * blockIdx.x;
        store_word(mine, __float_as_uint(best), flag);
        store_word(mine + 1, static_cast<std::uint32_t>(token), flag);
      }
    }
  }

  // The most likely token of all blocks', the lowest of equals.
  __device__ int most_likely(int row, unsigned flag) {
    float best = -INFINITY;
    int token = p_.vocab;
    if (thread_ < static_cast<int>(gridDim.x)) {
      const Word* from = best_words(row) + 2 * thread_;
      best = __uint_as_float(static_cast<std::uint32_t>(await_word(from, flag)));
      token = static_cast<int>(static_cast<std::uint32_t>(await_word(from + 1, flag)));
    }
    reduce_best(best, token);
    return token;
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
      block_memory().best[warp_][0] = best;
      block_memory().best[warp_][1] = __int_as_float(row);
    }
    consumers_sync();
    for (int i = 0; i < kConsumerWarps; ++i) take(block_memory().best[i][0], __float_as_int(block_memory().best[i][1]));
  }

  static constexpr bool kValuesLater = FORMAT == WeightFormat::kInt4;

  // Keys and values come from far: the first ones of a layer are asked for before what clusters add is waited for.
  // In 4 bits values, which are needed later, are asked for behind it: 2 % faster, where the others are 1 % slower.
  __device__ void load_first(LaneDims& to, const __nv_bfloat16* cache, int layer, const LayerParams& w, int kv_head,
                             int row = 0) {
    const Split split(position(row), w.window, rank_);
    if (4 * warp_ >= split.count) return;
    const long long at = layer * p_.cache_layer + row * p_.cache_row + kv_head * p_.cache_head +
                         static_cast<long long>(split.first) * kHeadDim;
    to.load(cache + at, min(thread_ / kKeyLanes, split.count - 1));
  }

  // A KV head's queries against this block's keys, told to all ranks; the heads' outputs into attended().
  __device__ void attend_round(int layer, const LayerParams& w, int kv_head, int round) {
    if (round > 0) {
      load_first(first_key_, p_.cache_k, layer, w, kv_head);
      load_first(first_value_, p_.cache_v, layer, w, kv_head);
    }
    for (int row = 0; row < rows(); ++row) attend_row(layer, w, kv_head, round, row);
    parts_inbox().await(heads_turn_++);
    join_splits(round);
    consumers_sync();
  }

  __device__ void attend_row(int layer, const LayerParams& w, int kv_head, int round, int row) {
    AttentionMemory& memory = block_memory().attention;
    const Split split(position(row), w.window, rank_);
    const long long head = layer * p_.cache_layer + row * p_.cache_row + kv_head * p_.cache_head;
    const __nv_bfloat16* keys = p_.cache_k + head + static_cast<long long>(split.first) * kHeadDim;
    const __nv_bfloat16* values = p_.cache_v + head + static_cast<long long>(split.first) * kHeadDim;
    const float* qkv = this->qkv() + row * (group_ + 2) * kHeadDim;
    const bool makes_key = split.has_new && warp_ == kNewKeyWarp;
    float gate = 0;
    if (makes_key && w.value_embed) {
      if (round > 0 || row > 0) value_row_ = value_row_of(w, kv_head, row);
      gate = value_gate(w, kv_head, row);
    }
    if (row == 0) qkv_inbox().await(heads_turn_);
    HeadVector key{}, value{};
    if (makes_key) {
      const long long at = head + static_cast<long long>(position(row)) * kHeadDim;
      key = HeadVector::load(qkv + group_ * kHeadDim);
      value = HeadVector::load(qkv + (group_ + 1) * kHeadDim);
      value.add(gate, {unpack(value_row_.x), unpack(value_row_.y)});
      value.append(p_.cache_v + at);
      key.scale(key.rotate(rotary(row), p_.norm_eps, p_.qk_scale));
      key.append(p_.cache_k + at);
    }
    for (int i = 0; i < group_; ++i) {
      HeadVector query = HeadVector::load(qkv + i * kHeadDim);
      const float factor = kScoreScale * query.rotate(rotary(row), p_.norm_eps, p_.qk_scale);
      query.store(memory.query[warp_]);
      __syncwarp();
      if (makes_key) {
        const float weight = exp2f(warp_sum(query.dot(key)) * factor);
        HeadVector weighted = value;
        weighted.scale(weight);
        weighted.store(memory.sum[kConsumerWarps]);
        if (lane_ == 0) memory.weight[kConsumerWarps] = weight;
      }
      attend(memory, first_key_, first_value_, keys, values, split.count, factor);
      const bool last = i + 1 == group_, more = row + 1 < rows();
      if (last && more) {
        load_first(first_key_, p_.cache_k, layer, w, kv_head, row + 1);
        load_first(first_value_, p_.cache_v, layer, w, kv_head, row + 1);
      }
      consumers_sync();
      send_parts(row * group_ + i, split.has_new ? kConsumerWarps + 1 : kConsumerWarps);
      if (!last || more) consumers_sync();  // the warps' sums have been read
    }
  }

  // What this block's warps, and the new key, add to a head.
  __device__ void send_parts(int head, int count) {
    const AttentionMemory& memory = block_memory().attention;
    if (thread_ < kHeadDim) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kConsumerWarps; ++i) sum += memory.sum[i][thread_];
      if (count > kConsumerWarps) sum += memory.sum[kConsumerWarps][thread_];
      send_floats(parts_inbox(), sum, kGroup,
                  [&](int first) { return parts() + (head * kRanks + rank_) * kHeadDim + kGroup * warp_ + first; });
    } else if (warp_ == kHeadDim / kGroup) {
      const float total = warp_sum(lane_ < count ? memory.weight[lane_] : 0.0F);
      if (lane_ < kRanks) parts_inbox().send(weights() + head * kRanks + rank_, total, lane_);
    }
  }

  // A warp joins 32 dims of a head, which is one of all rows' heads.
  __device__ void join_splits(int round) {
    constexpr int kGroupsOfHead = kHeadDim / kGroup;
    for (int unit = warp_; unit < rows() * group_ * kGroupsOfHead; unit += kConsumerWarps) {
      const int head = unit / kGroupsOfHead, dim = unit % kGroupsOfHead * kGroup + lane_;
      float total = 0, sum = 0;
#pragma unroll
      for (int i = 0; i < kRanks; ++i) {
        total += weights()[head * kRanks + i];
        sum += parts()[(head * kRanks + i) * kHeadDim + dim];
      }
      const int row = ROWS == 1 ? 0 : head / group_;
      const int group = (round - row) * group_ * kGroupsOfHead + unit;
      const Vector to = attended().row(row);
      const GroupInfo info = write_column<FORMAT>(to.group(group), lane_, __fdividef(sum, total));
      if (lane_ == 0) to.info(group) = info;
    }
  }

  // Of the token and a KV head, for the warp that makes values. It comes from far: it is asked for early.
  __device__ uint2 value_row_of(const LayerParams& w, int kv_head, int row = 0) const {
    if (!w.value_embed || rank_ != kRanks - 1 || warp_ != kNewKeyWarp) return make_uint2(0, 0);
    const auto* from = reinterpret_cast<const std::uint32_t*>(
        w.value_embed + (static_cast<long long>(token(row)) * p_.n_kv_head + kv_head) * kHeadDim);
    return make_uint2(from[lane_], from[kHeadDim / 4 + lane_]);
  }

  __device__ float value_gate(const LayerParams& w, int kv_head, int row) const {
    float gate = 0;
    for (int channel = lane_; channel < p_.gate_channels; channel += 32) {
      gate += x(false).row(row).template value<FORMAT>(channel) * w.ve_gate[kv_head * p_.gate_channels + channel];
    }
    return p_.gate_scale * sigmoid(warp_sum(gate) * block_memory().norm_factor[row]);
  }

  __device__ float inverse_norm(float squares) const { return rsqrtf(squares * p_.inverse_width + p_.norm_eps); }

  const DecodeParams& p_;
  RingReader ring_;
  const int thread_ = static_cast<int>(threadIdx.x), warp_ = thread_ / 32, lane_ = thread_ % 32;
  const int rank_ = cluster_rank(), cluster_ = static_cast<int>(blockIdx.x) / kRanks;
  const RankRows own_{p_.n_embd, rank_};
  const ClusterShare& share_;
  const int group_;                                      // query heads of one KV head
  unsigned x_turn_ = 0, mlp_turn_ = 0, heads_turn_ = 0;  // of inboxes: of x, of the MLP's x and inside, of attention's
  unsigned sums_turn_ = 0, first_flag_ = 0;
  float best_ = 0;  // of this thread's logits
  int best_row_ = 0;
  DecodeState only_{};  // of a single row, what is fed in this step
  uint2 value_row_{};   // of the value embedding
  LaneDims first_key_{}, first_value_{};
  // of the residual stream, the embedding, the layer to back out: of each of this warp's groups
  static constexpr int kUnits = (ROWS * kMostRankGroups + kConsumerWarps - 1) / kConsumerWarps;
  float element_[kUnits] = {}, embedded_[kUnits] = {}, middle_[kUnits] = {};
};

template <WeightFormat FORMAT, int GROUPS, int ROWS>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const __grid_constant__ DecodeParams p) {
  BlockMemory& memory = block_memory();
  Consumer<FORMAT, GROUPS, ROWS> consumer(p);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kEntries; ++i) {
      init_barrier(&memory.barriers.full[i], 1);
      init_barrier(&memory.barriers.empty[i], kReadings);
    }
    consumer.open_inboxes();
    asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
  }
  const Sums sums{p.layout.sums, ROWS == 1 ? 1 : p.rows};
  for (int i = static_cast<int>(threadIdx.x); i < 2 * sums.batch * kPassRows; i += kThreads) {
    for (int slot = kProductWarps; slot < kSumSlots; ++slot) sums.all()[i][slot] = 0;
  }
  for (int i = static_cast<int>(threadIdx.x); i < p.n_layer; i += kThreads) memory.layers[i] = p.layers[i];
  __syncthreads();
  cluster_sync();  // before any rank sends
  if (threadIdx.x >= kConsumers) {
    RingWriter ring(&memory.barriers, shared_memory + p.layout.ring, p.layout.ring_bytes, p.in_flight);
    produce<FORMAT, ROWS>(p, memory.layers, ring);
  } else {
    consumer.run();
  }
  cluster_sync();  // a block that has ended cannot be sent to
}

}  // namespace nanochat_x::cuda
