#pragma once

// Attention of a step of one token a row, which reads keys and values of each row and head once. They are a run of
// tiles, item behind item (a row's head), which is dealt out to the blocks evenly: one to a multiprocessor. In each,
// one thread has tiles copied into a ring in shared memory, from before the product in front of this kernel has ended:
// they are there since earlier steps. The warps make queries, and new keys and values, and attend to a tile together.
//
// An item that begins in one block and ends in another is added up by the block that is the last to have its part.
// Exponentials are taken without the largest score, as in attend.cuh. Keys that all rows have alike are not read here:
// what attend_shared has made of them is added.

#include <cuda_bf16.h>

#include <cstdint>

#include "attend_tokens.cuh"
#include "barrier.cuh"
#include "dependent.cuh"
#include "head_vector.cuh"
#include "packed.cuh"
#include "ring.cuh"
#include "row_kernels.cuh"

namespace nanochat_x::cuda {

inline constexpr int kStepWarps = 8, kStepConsumers = 32 * kStepWarps, kStepThreads = kStepConsumers + 32;
inline constexpr int kStepKeys = 4 * kStepWarps;                 // each warp has four
inline constexpr int kStepTileBytes = kStepKeys * kHeadDim * 2;  // of keys, and as many of values
inline constexpr int kStepStages = 5;                            // of the ring

struct AttendStepParams {
  HeadParams heads;
  AttendParams attend;  // `parts`: two of each block
  int rows;
  unsigned* arrived;  // [rows, n_head]: parts of an item that are there; zeros between kernels
  SharedKeys shared;
};

struct AttendStepMemory {
  alignas(128) unsigned char tiles[kStepStages][2][kStepTileBytes];
  alignas(16) float query[kStepWarps][kHeadDim];          // of some items, of as many as there are warps
  alignas(16) float fresh[kStepWarps][kHeadDim];          // the new values, weighted, and what rows have alike
  alignas(16) float sum[2][kStepWarps][kHeadDim];         // of values, by warp; of one item while another's are read
  float fresh_weight[kStepWarps], weight[2][kStepWarps];  // sums of exponentials
  std::uint64_t full[kStepStages], empty[kStepStages];
  bool is_last;
};

// One head of one row, and its own keys before the new one.
struct StepItem {
  int row, head, begin;  // begin: the first of its tiles among all
  int position, first, count;

  __device__ void see(const AttendStepParams& p) {
    position = row < p.rows ? __ldg(p.attend.position + row) : 0;
    first = max(p.shared.count, position - p.attend.window);
    count = position - first;
  }
  // One at least: the new key belongs to an item's last tile.
  __device__ int tiles() const { return max(1, (count + kStepKeys - 1) / kStepKeys); }
  __device__ int end() const { return begin + tiles(); }
  __device__ int keys_of(int tile) const { return max(0, min(kStepKeys, count - (tile - begin) * kStepKeys)); }
  __device__ void next(const AttendStepParams& p) {
    begin = end();
    if (++head < p.attend.n_head) return;
    head = 0;
    ++row;
    see(p);
  }
};

class AttendStep {
 public:
  explicit __device__ AttendStep(const AttendStepParams& params)
      : p_(params), memory_(*reinterpret_cast<AttendStepMemory*>(shared_memory)) {}

  __device__ void run() {
    if (thread_ == 0) {
      for (int i = 0; i < kStepStages; ++i) {
        init_barrier(&memory_.full[i], 1);
        init_barrier(&memory_.empty[i], kStepWarps);
      }
      asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
    }
    allow_dependent();
    __syncthreads();
    deal_out();
    if (thread_ >= kStepConsumers) {
      if (lane_ == 0) produce();
      return;
    }
    StepItem item = first_;
    int tile = begin_;
    bool waits = true;
    while (tile < end_) {
      prepare(item, waits);
      waits = false;
      sync();
      for (int i = 0; i < kStepWarps && tile < end_; ++i) {
        attend(item, tile, i);
        if (tile == item.end()) item.next(p_);
      }
      if (tile < end_) sync();  // queries have been read
    }
  }

 private:
  static __device__ void sync() { asm volatile("bar.sync 1, %0;" ::"n"(kStepConsumers) : "memory"); }
  static __device__ void sync_finishers() { asm volatile("bar.sync 2, %0;" ::"n"(kHeadDim) : "memory"); }

  __device__ int tiles_of_row(int row) const {
    if (row >= p_.rows) return 0;
    StepItem item{row, 0, 0, 0, 0, 0};
    item.see(p_);
    return p_.attend.n_head * item.tiles();
  }

  // Which tiles are this block's, and the item that the first of them belongs to.
  __device__ void deal_out() {
    int all = 0;
    for (int base = 0; base < p_.rows; base += 32) all += __reduce_add_sync(~0U, tiles_of_row(base + lane_));
    all_ = all;
    blocks_ = min(static_cast<int>(gridDim.x), all);
    if (static_cast<int>(blockIdx.x) >= blocks_) return;
    const auto begin_of = [&](unsigned block) {
      return static_cast<int>(static_cast<long long>(all) * block / blocks_);
    };
    begin_ = begin_of(blockIdx.x);
    end_ = begin_of(blockIdx.x + 1);
    int before = 0;
    for (int base = 0;; base += 32) {
      const int own = tiles_of_row(base + lane_);
      int end = own;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(~0U, end, distance);
        if (lane_ >= distance) end += other;
      }
      const unsigned behind = __ballot_sync(~0U, before + end > begin_);
      if (behind != 0) {
        const int which = __ffs(static_cast<int>(behind)) - 1;
        first_.row = base + which;
        first_.begin = before + __shfl_sync(~0U, end - own, which);
        break;
      }
      before += __shfl_sync(~0U, end, 31);
    }
    first_.see(p_);
    first_.head = (begin_ - first_.begin) / first_.tiles();
    first_.begin += first_.head * first_.tiles();
  }
  __device__ int block_of(int tile) const {
    return static_cast<int>((static_cast<long long>(tile + 1) * blocks_ - 1) / all_);
  }

  __device__ long long in_cache(const StepItem& item) const {
    return item.row * p_.attend.cache_row + item.head / p_.attend.group * p_.attend.cache_head;
  }

  __device__ long long first_of(const StepItem& item, int tile) const {
    return in_cache(item) + static_cast<long long>(item.first + (tile - item.begin) * kStepKeys) * kHeadDim;
  }

  // By one thread: all of the block's tiles.
  __device__ void produce() const {
    StepItem item = first_;
    const std::uint64_t policy = evict_first();
    for (int tile = begin_; tile < end_; ++tile) {
      if (tile == item.end()) item.next(p_);
      const int turn = tile - begin_, stage = turn % kStepStages;
      if (turn >= kStepStages) wait_barrier(&memory_.empty[stage], (turn / kStepStages - 1) & 1);
      const int bytes = item.keys_of(tile) * kHeadDim * 2;
      expect_bytes(&memory_.full[stage], 2 * bytes);
      if (bytes == 0) continue;
      const long long from = first_of(item, tile);
      copy_bulk(shared_address(memory_.tiles[stage][0]), p_.attend.keys + from, bytes, &memory_.full[stage], policy);
      copy_bulk(shared_address(memory_.tiles[stage][1]), p_.attend.values + from, bytes, &memory_.full[stage], policy);
    }
  }

  // Each warp makes the query of an item, from `item` on, and, of those that end here, the new key and value.
  __device__ void prepare(StepItem item, bool waits) {
    for (int i = 0; i < warp_ && item.begin < end_; ++i) item.next(p_);
    if (item.begin >= end_) {
      if (waits) await_dependence();
      return;
    }
    const HeadParams& h = p_.heads;
    const int kv_head = item.head / p_.attend.group;
    const Rotary rotary = Rotary::load(h.cos + item.position * (kHeadDim / 2), h.sin + item.position * (kHeadDim / 2));
    const bool ends = item.end() <= end_, has_embed = ends && h.value_embed != nullptr;
    HeadVector embed{};
    if (has_embed) {
      embed = HeadVector::load(h.value_embed +
                               (static_cast<long long>(h.tokens.token[item.row]) * h.n_kv_head + kv_head) * kHeadDim);
    }
    if (waits) await_dependence();
    const __nv_bfloat16* raw = h.qkv + item.row * p_.attend.q_stride;
    HeadVector query = HeadVector::load(raw + item.head * kHeadDim);
    HeadVector key{}, value{};
    SharedSum shared{};
    if (ends) {
      shared = shared_sum(item);
      key = HeadVector::load(raw + (h.n_head + kv_head) * kHeadDim);
      value = HeadVector::load(raw + (h.n_head + h.n_kv_head + kv_head) * kHeadDim);
    }
    query.scale(kScoreScale * query.rotate(rotary, h.norm_eps, h.qk_scale));
    query.store(memory_.query[warp_]);
    float weight = 0;
    if (ends) {
      if (has_embed) value.add(gate_of(item.row, kv_head), embed);
      key.scale(key.rotate(rotary, h.norm_eps, h.qk_scale));
      const long long at = in_cache(item) + static_cast<long long>(item.position) * kHeadDim;
      const bool appends = item.head % p_.attend.group == 0;  // the first of the KV head's queries
      key.append(h.keys + at, appends);
      value.append(h.values + at, appends);
      weight = exp2f(warp_sum(query.dot(key)));
      value.scale(weight);
    }
    value.store(memory_.fresh[warp_]);
    if (lane_ == 0) memory_.fresh_weight[warp_] = weight + shared.weight;
    __syncwarp();
    float4& four = reinterpret_cast<float4*>(memory_.fresh[warp_])[lane_];
    four = four + shared.values;
  }

  // What an item has of the keys that are alike in all rows. Lane l has dims 4 l and on.
  struct SharedSum {
    float4 values;
    float weight;
  };
  __device__ SharedSum shared_sum(const StepItem& item) const {
    SharedSum sum{};
    if (!p_.shared.is_seen(item.position, p_.attend.window)) return sum;
#pragma unroll 8
    for (int i = 0; i < p_.shared.chunks; ++i) {
      const float* part = p_.shared.part(i, p_.rows, p_.attend.n_head, item.row, item.head);
      sum.values = sum.values + __ldcg(reinterpret_cast<const float4*>(part) + lane_);
      sum.weight += __ldcg(part + kHeadDim);
    }
    return sum;
  }

  __device__ float gate_of(int row, int kv_head) const {
    const HeadParams& h = p_.heads;
    float gate = 0;
    for (int channel = lane_; channel < h.gate_channels; channel += 32) {
      gate += __bfloat162float(h.normed[static_cast<long long>(row) * h.n_embd + channel]) *
              h.ve_gate[kv_head * h.gate_channels + channel];
    }
    gate = warp_sum(gate);
    if (h.norm_factor != nullptr) gate *= h.norm_factor[row];
    return h.gate_scale * sigmoid(gate);
  }

  // The tiles of an item that are this block's, from `tile` on; its query is the i-th that was made. Lane l has dims
  // 8 (l % 8) and on, and those 64 behind, of key l / 8 of the warp's four.
  __device__ void attend(const StepItem& item, int& tile, int i) {
    float query[16], out[16] = {}, total = 0;
    const int dim = lane_ % 8 * 8;
#pragma unroll
    for (int j = 0; j < 16; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(&memory_.query[i][dim + j % 8 + j / 8 * 64]);
      query[j] = four.x, query[j + 1] = four.y, query[j + 2] = four.z, query[j + 3] = four.w;
    }
    const int stop = min(item.end(), end_), buffer = buffer_;
    buffer_ ^= 1;
    for (; tile < stop; ++tile) {
      const int turn = tile - begin_, stage = turn % kStepStages;
      wait_barrier(&memory_.full[stage], (turn / kStepStages) & 1);
      const int keys = item.keys_of(tile);
      if (4 * warp_ < keys) {
        const int which = 4 * warp_ + lane_ / 8, there = min(which, keys - 1);
        const auto* key = reinterpret_cast<const uint4*>(memory_.tiles[stage][0]) + there * 16 + lane_ % 8;
        const auto* value = reinterpret_cast<const uint4*>(memory_.tiles[stage][1]) + there * 16 + lane_ % 8;
        const float score = lanes_sum<8>(dot8(key[0], query) + dot8(key[8], query + 8));
        const float weight = which < keys ? exp2f(score) : 0.0F;
        total += weight;
        add8(out, weight, value[0]);
        add8(out + 8, weight, value[8]);
      }
      __syncwarp();
      if (lane_ == 0) arrive(&memory_.empty[stage], 1);
    }
    // Lanes l, l + 8, l + 16 and l + 24 have the same dims of different keys: each is left with four of them.
    halve<16>(out, 16);
    halve<8>(out, 8);
    total += __shfl_xor_sync(~0U, total, 16);
    total += __shfl_xor_sync(~0U, total, 8);
    *reinterpret_cast<float4*>(&memory_.sum[buffer][warp_][dim + (lane_ & 16 ? 64 : 0) + (lane_ & 8 ? 4 : 0)]) =
        make_float4(out[0], out[1], out[2], out[3]);
    if (lane_ == 0) memory_.weight[buffer][warp_] = total;
    sync();
    if (thread_ < kHeadDim) finish(item, i, buffer);
  }

  // A thread has a dim.
  __device__ void finish(const StepItem& item, int i, int buffer) {
    const bool ends = item.end() <= end_;
    float sum = ends ? memory_.fresh[i][thread_] : 0, total = ends ? memory_.fresh_weight[i] : 0;
#pragma unroll
    for (int j = 0; j < kStepWarps; ++j) {
      sum += memory_.sum[buffer][j][thread_];
      total += memory_.weight[buffer][j];
    }
    const bool begins = item.begin >= begin_;
    if (!(begins && ends)) {
      if (!join(item, begins, sum, total)) return;
    }
    const long long which = static_cast<long long>(item.row) * p_.attend.n_head + item.head;
    p_.attend.out[which * kHeadDim + thread_] = __float2bfloat16(sum / total);
  }

  // Leaves this block's part of an item for the others. False if not all of them are there, else it has them all.
  __device__ bool join(const StepItem& item, bool begins, float& sum, float& total) {
    const auto part_of = [&](int block, bool first) {
      return p_.attend.parts + (2 * block + (first ? 1 : 0)) * kPartStride;
    };
    float* own = part_of(static_cast<int>(blockIdx.x), begins);
    own[thread_] = sum;
    if (thread_ == 0) own[kHeadDim] = total;
    __threadfence();
    sync_finishers();
    const int from = block_of(item.begin), to = block_of(item.end() - 1);
    if (thread_ == 0) {
      unsigned* arrived = p_.arrived + static_cast<long long>(item.row) * p_.attend.n_head + item.head;
      memory_.is_last = atomicAdd(arrived, 1U) == static_cast<unsigned>(to - from);
      if (memory_.is_last) *arrived = 0;
    }
    sync_finishers();
    if (!memory_.is_last) return false;
    __threadfence();
    sum = total = 0;
    for (int block = from; block <= to; ++block) {
      const float* part = part_of(block, block == from);
      sum += __ldcg(part + thread_);
      total += __ldcg(part + kHeadDim);
    }
    return true;
  }

  const AttendStepParams& p_;
  AttendStepMemory& memory_;
  const int thread_ = static_cast<int>(threadIdx.x), warp_ = thread_ / 32, lane_ = thread_ % 32;
  int all_ = 0, begin_ = 0, end_ = 0;  // tiles: of all blocks, of this one
  int blocks_ = 0;                     // that have tiles, the first ones
  StepItem first_{};
  int buffer_ = 0;
};

// Grid: as many blocks as are to be busy.
__global__ void __launch_bounds__(kStepThreads, 1) attend_step(const __grid_constant__ AttendStepParams p) {
  AttendStep(p).run();
}

}  // namespace nanochat_x::cuda
