#pragma once

// A product of a step of many rows (up to 64) with a matrix, and what belongs to it: the norm in front, and relu^2, the
// residual stream or the cap of the logits behind. What such a step waits for is its weights, and one kernel after the
// other. So blocks are small enough for two to share a multiprocessor, and ask for their weights before the kernel in
// front of them has ended.
//
// A block has 64 TILES rows of the matrix and one of RANKS parts of its columns: matrix rows are the left operand of
// the tensor cores, rows of x the right one. The RANKS blocks of a cluster add up what they have, in a fixed order.

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "cluster.cuh"
#include "dependent.cuh"
#include "packed.cuh"
#include "quads.cuh"
#include "ring.cuh"
#include "warming.cuh"
#include "wgmma.cuh"

namespace nanochat_x::cuda {

// What becomes of a product.
enum class After : std::uint8_t { heads, hidden, stream, logits };

struct BatchProductParams {
  CUtensorMap weights, x;     // boxes of 64 columns, and of a block's rows
  int rows, n, k;             // of x, of the matrix, columns of both
  int weight_slots, x_slots;  // chunks of 64 columns that a block has room for
  RowSquares norm;            // of x; but for `stream`
  float inverse_width, norm_eps;
  __nv_bfloat16* out;  // heads, hidden: [rows, n]
  float* norm_factor;  // heads: gets what x is to be multiplied by, [rows]
  // stream: x += the product, x becomes own * x + share * other
  float* stream;           // [rows, n]
  const float* other;      // null: none
  float own, share;        // 1 and 0: x is that
  float* middle;           // gets what x was before that; null: none
  __nv_bfloat16* rounded;  // gets x
  RowSquares squares;      // get those of x
  float* logits;           // [rows, n]
  float softcap;           // 0: none
  Warming warming;
};

template <int TILES, int COLUMNS, int RANKS>
struct BatchShape {
  static constexpr int kRows = 64 * TILES;        // of the matrix
  static constexpr int kConsumers = 128 * TILES;  // threads: a warpgroup for each 64 rows
  static constexpr int kBlockThreads = kConsumers + 32;
  static constexpr int kWeightBytes = kRows * kOperandRowBytes, kXBytes = COLUMNS * kOperandRowBytes;  // of a chunk
  static constexpr int kPitch = kRows + 4;  // floats of a row of sums; neighbouring lanes' lie in different banks
  static constexpr int kLanes = kRows / 4;  // that finish a row of x, four rows of the matrix each
  static constexpr int kRowsAtOnce = kConsumers / kLanes;
  static constexpr int kRankColumns = (COLUMNS + RANKS - 1) / RANKS;  // rows of x that a rank finishes
  static constexpr int kTurns = (kRankColumns + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr int kSumBytes = COLUMNS * kPitch * static_cast<int>(sizeof(float));

  // Operands, in whose place sums come, then barriers.
  static __host__ __device__ constexpr int operand_bytes(int weight_slots, int x_slots) {
    const int bytes = weight_slots * kWeightBytes + x_slots * kXBytes;
    return bytes < kSumBytes ? kSumBytes : bytes;
  }
  static __host__ __device__ constexpr int shared_bytes(int weight_slots, int x_slots) {
    return operand_bytes(weight_slots, x_slots) +
           (weight_slots + 2 * x_slots) * static_cast<int>(sizeof(std::uint64_t));
  }
};

__device__ inline float4 load_from_rank(std::uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// A box of x: it is read by many blocks.
__device__ inline void copy_shared_box(std::uint32_t to, const CUtensorMap* map, int column, std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to),
      "l"(map), "r"(column), "r"(0), "r"(shared_address(barrier))
      : "memory");
}

// Grid: RANKS, blocks of rows of the matrix. Cluster: RANKS.
template <After AFTER, int TILES, int COLUMNS, int RANKS>
class BatchProduct {
 public:
  using Shape = BatchShape<TILES, COLUMNS, RANKS>;

  explicit __device__ BatchProduct(const BatchProductParams& params) : p_(params) {
    const int chunks = (p_.k + kOperandColumns - 1) / kOperandColumns;
    begin_ = chunks * rank_ / RANKS;
    count_ = chunks * (rank_ + 1) / RANKS - begin_;
  }

  __device__ void run() {
    if (thread_ == Shape::kConsumers) open();
    allow_dependent();
    __syncthreads();
    if (thread_ >= Shape::kConsumers) {
      if (thread_ == Shape::kConsumers) produce();
      __syncwarp();
    } else {
      await_dependence();
      load_inputs();
      multiply();
      if (AFTER != After::stream) take_norms();
    }
    join();
    if (thread_ < Shape::kConsumers) {
      finish();
    } else if (RANKS > 1) {
      cluster_arrive();
    }
    if (RANKS > 1) cluster_wait();  // what others read must stay
  }

 private:
  // A place of a ring, and how often it was come to, which is what its barriers count.
  struct Slot {
    int index = 0;
    unsigned turn = 0;
    __device__ void next(int slots) {
      if (++index == slots) index = 0, ++turn;
    }
  };

  __device__ std::uint64_t* barriers() const {
    return reinterpret_cast<std::uint64_t*>(shared_memory + Shape::operand_bytes(p_.weight_slots, p_.x_slots));
  }
  __device__ std::uint64_t* weights_full(int slot) const { return barriers() + slot; }
  __device__ std::uint64_t* x_full(int slot) const { return barriers() + p_.weight_slots + slot; }
  __device__ std::uint64_t* done(int slot) const { return x_full(slot) + p_.x_slots; }  // with what is in it of x
  __device__ std::uint32_t weights_at(int slot) const {
    return shared_address(shared_memory) + static_cast<unsigned>(slot * Shape::kWeightBytes);
  }
  __device__ std::uint32_t x_at(int slot) const {
    return weights_at(p_.weight_slots) + static_cast<unsigned>(slot * Shape::kXBytes);
  }

  // Barriers, and all weights that there is room for.
  __device__ void open() {
    for (int i = 0; i < p_.weight_slots; ++i) init_barrier(weights_full(i), 1);
    for (int i = 0; i < p_.x_slots; ++i) {
      init_barrier(x_full(i), 1);
      init_barrier(done(i), Shape::kConsumers / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
    for (int i = 0; i < min(p_.weight_slots, count_); ++i) ask_for_weights(i, i);
  }
  __device__ void ask_for_weights(int chunk, int slot) {
    expect_bytes(weights_full(slot), Shape::kWeightBytes);
    copy_box(weights_at(slot), &p_.weights, (begin_ + chunk) * kOperandColumns, block_row_, weights_full(slot),
             evict_first());
  }

  // There are no fewer slots for weights than for x: whoever has room for a chunk of x has some for weights.
  __device__ void produce() {
    await_dependence();
    Slot x, weights;
    for (int i = 0; i < count_; ++i) {
      if (i >= p_.x_slots) {
        wait_barrier(done(x.index), (x.turn - 1) & 1U);
        if (const int chunk = i - p_.x_slots + p_.weight_slots; chunk < count_) ask_for_weights(chunk, weights.index);
        weights.next(p_.weight_slots);
      }
      expect_bytes(x_full(x.index), Shape::kXBytes);
      copy_shared_box(x_at(x.index), &p_.x, (begin_ + i) * kOperandColumns, x_full(x.index));
      x.next(p_.x_slots);
    }
    // Behind all that this block waits for.
    if (p_.warming.most > 0) {
      warm(p_.warming, static_cast<int>(blockIdx.x + gridDim.x * blockIdx.y), static_cast<int>(gridDim.x * gridDim.y));
    }
  }

  // The i-th row of x that this thread's lanes finish; p_.rows or more: none.
  __device__ int row_of(int turn) const {
    const int i = turn * Shape::kRowsAtOnce + thread_ / Shape::kLanes;
    return i < Shape::kRankColumns ? rank_ * Shape::kRankColumns + i : COLUMNS;
  }
  __device__ int lane() const { return thread_ % Shape::kLanes; }
  __device__ int column() const { return block_row_ + 4 * lane(); }  // the first of four of the output

  // What is needed behind the product comes from far.
  __device__ void load_inputs() {
#pragma unroll
    for (int turn = 0; turn < Shape::kTurns; ++turn) {
      const int row = row_of(turn);
      if constexpr (AFTER == After::stream) {
        if (row >= p_.rows) continue;
        const long long at = static_cast<long long>(row) * p_.n + column();
        before_[turn] = *reinterpret_cast<const float4*>(p_.stream + at);
        if (p_.other != nullptr) other_[turn] = *reinterpret_cast<const float4*>(p_.other + at);
      } else {
        float squares = 0;
        if (row < p_.rows) {
          for (int i = lane(); i < p_.norm.parts; i += Shape::kLanes) squares += p_.norm.of(row)[i];
        }
        factor_[turn] = squares;
      }
    }
  }
  __device__ void take_norms() {
#pragma unroll
    for (float& factor : factor_) {
      factor = rsqrtf(lanes_sum<Shape::kLanes>(factor) * p_.inverse_width + p_.norm_eps);
    }
  }

  __device__ void multiply() {
    const int group = thread_ / 128;
    Slot weights, x;
    int before = 0;  // slot of the last chunk's x
    for (int i = 0; i < count_; ++i) {
      wait_barrier(weights_full(weights.index), weights.turn & 1U);
      wait_barrier(x_full(x.index), x.turn & 1U);
      const std::uint64_t right = operand_at(x_at(x.index)),
                          left = operand_at(weights_at(weights.index) +
                                            static_cast<unsigned>(group * 64 * kOperandRowBytes));
      begin_products();
#pragma unroll
      for (int k = 0; k < kOperandColumns / 16; ++k) multiply_operands<COLUMNS>(sum_, left + 2 * k, right + 2 * k);
      commit_products();
      await_products<1>(sum_);
      if (i > 0 && thread_ % 32 == 0) arrive(done(before), 1);
      before = x.index;
      weights.next(p_.weight_slots);
      x.next(p_.x_slots);
    }
    await_products<0>(sum_);
    asm volatile("bar.sync 1, %0;" ::"n"(Shape::kConsumers) : "memory");  // all have read the operands
    auto* sums = reinterpret_cast<float*>(shared_memory);
    const int row = thread_ / 32 * 16 + thread_ % 32 / 4;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* to = sums + (8 * j + thread_ % 4 * 2 + i) * Shape::kPitch + row;
        to[0] = sum_[4 * j + i];
        to[8] = sum_[4 * j + 2 + i];
      }
    }
  }

  __device__ void join() const {
    if (RANKS > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }

  __device__ void finish() {
    const std::uint32_t sums = shared_address(shared_memory);
    float4 parts[Shape::kTurns][RANKS];
#pragma unroll
    for (int turn = 0; turn < Shape::kTurns; ++turn) {
      const int row = row_of(turn);
      if (row >= p_.rows) continue;
      const std::uint32_t at = sums + static_cast<unsigned>(4 * (row * Shape::kPitch + 4 * lane()));
#pragma unroll
      for (int i = 0; i < RANKS; ++i) {
        if constexpr (RANKS > 1) {
          parts[turn][i] = load_from_rank(address_at(at, i));
        } else {
          parts[turn][i] = *reinterpret_cast<const float4*>(shared_memory + (at - sums));
        }
      }
    }
    __syncwarp();
    if (RANKS > 1) cluster_arrive();  // others' sums have been read
#pragma unroll
    for (int turn = 0; turn < Shape::kTurns; ++turn) {
      float4 sum = parts[turn][0];
#pragma unroll
      for (int i = 1; i < RANKS; ++i) sum = sum + parts[turn][i];
      finish_row(turn, row_of(turn), sum);
    }
  }

  // All lanes of a warp call it.
  __device__ void finish_row(int turn, int row, float4 sum) {
    const bool there = row < p_.rows;
    const long long at = static_cast<long long>(row) * p_.n + column();
    if constexpr (AFTER == After::stream) {
      float4 x = before_[turn] + sum;
      if (there && p_.middle != nullptr) *reinterpret_cast<float4*>(p_.middle + at) = x;
      x = p_.own * x;
      if (p_.other != nullptr) x = x + p_.share * other_[turn];
      const float squares = lanes_sum<Shape::kLanes>(there ? squares_of(x) : 0);
      if (!there) return;
      *reinterpret_cast<float4*>(p_.stream + at) = x;
      *reinterpret_cast<uint2*>(p_.rounded + at) = pack4(x);
      if (lane() == 0) p_.squares.of(row)[blockIdx.y] = squares;
    } else {
      if (!there) return;
      const float4 value = factor_[turn] * sum;
      if constexpr (AFTER == After::logits) {
        const float4 capped =
            p_.softcap > 0 ? make_float4(cap(value.x), cap(value.y), cap(value.z), cap(value.w)) : value;
        if (p_.n % 4 == 0) {
          if (column() < p_.n) *reinterpret_cast<float4*>(p_.logits + at) = capped;
          return;
        }
        auto* to = reinterpret_cast<float2*>(p_.logits + at);
        if (column() < p_.n) to[0] = make_float2(capped.x, capped.y);  // n is even
        if (column() + 2 < p_.n) to[1] = make_float2(capped.z, capped.w);
      } else if constexpr (AFTER == After::hidden) {
        const float4 positive = make_float4(fmaxf(value.x, 0), fmaxf(value.y, 0), fmaxf(value.z, 0), fmaxf(value.w, 0));
        *reinterpret_cast<uint2*>(p_.out + at) = pack4(positive * positive);
      } else {
        *reinterpret_cast<uint2*>(p_.out + at) = pack4(value);
        if (column() == 0) p_.norm_factor[row] = factor_[turn];
      }
    }
  }
  __device__ float cap(float logit) const { return p_.softcap * tanhf(logit / p_.softcap); }

  const BatchProductParams& p_;
  const int thread_ = static_cast<int>(threadIdx.x), rank_ = static_cast<int>(blockIdx.x);
  const int block_row_ = static_cast<int>(blockIdx.y) * Shape::kRows;
  int begin_, count_;  // chunks of columns
  float sum_[COLUMNS / 2] = {};
  float factor_[Shape::kTurns];
  float4 before_[Shape::kTurns], other_[Shape::kTurns];
};

template <After AFTER, int TILES, int COLUMNS, int RANKS>
__global__ void __launch_bounds__(BatchShape<TILES, COLUMNS, RANKS>::kBlockThreads)
    batch_product(const __grid_constant__ BatchProductParams p) {
  BatchProduct<AFTER, TILES, COLUMNS, RANKS>(p).run();
}

}  // namespace nanochat_x::cuda
