#pragma once

// The stream of weights: one warp of each block copies them into a ring in shared memory, in the order in which the
// other warps use them, as far ahead as the ring is long. What a block needs is known long before it can be used, so
// the memory works on while blocks wait for each other.

#include <cstdint>

#include "decode_params.h"

namespace nanochat_x::cuda {

inline constexpr int kConsumerWarps = 8;
inline constexpr int kConsumers = 32 * kConsumerWarps;
inline constexpr int kThreads = kConsumers + 32;
inline constexpr int kTile = 8;         // rows of weights in one entry of the ring: the n of a tensor core's m16n8k16
inline constexpr int kPassRows = 40;    // rows whose sums are kept in registers at a time
inline constexpr int kEntries = 32;     // of the ring, at most
inline constexpr int kRowPadding = 64;  // bytes behind each row: neighbouring rows then lie in different banks

struct Barriers {
  std::uint64_t full[kEntries], empty[kEntries];
  int rows[kEntries];  // of each entry; the writer's own
};

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void init_barrier(std::uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ inline void wait_barrier(std::uint64_t* barrier, unsigned parity) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @done bra.uni over;\n bra.uni again;\nover:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ inline void arrive(std::uint64_t* barrier) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ inline void expect_bytes(std::uint64_t* barrier, int bytes) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// bytes and both addresses are multiples of 16. Weights are read once a step: they leave the L2 cache to others.
__device__ inline void copy_bulk(std::uint32_t to, const void* from, int bytes, std::uint64_t* barrier,
                                 std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

__device__ inline std::uint64_t evict_first() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// The rows [begin, end) of a matrix of `rows` rows (even) that fall to one of `blocks` blocks, in pairs.
struct Share {
  int begin, end;
};

__device__ inline Share share(int rows, int block, int blocks) {
  const int pairs = rows / 2;
  return {2 * (pairs * block / blocks), 2 * (pairs * (block + 1) / blocks)};
}

// The writing end; all 32 lanes of the producer's warp call it together.
class RingWriter {
 public:
  __device__ RingWriter(Barriers* barriers, unsigned char* ring, int slots, int row_bytes, int in_flight)
      : barriers_(barriers),
        ring_(shared_address(ring)),
        slots_(slots),
        row_bytes_(row_bytes),
        free_(slots),
        in_flight_(in_flight),
        policy_(evict_first()) {}

  // One entry of `rows` rows (1 to 8); row_of(i) is the address of row i.
  template <typename RowOf>
  __device__ void put(int rows, RowOf row_of) {
    while (free_ < rows || head_ - tail_ == kEntries) {
      wait_barrier(&barriers_->empty[tail_ % kEntries], (tail_ / kEntries) & 1U);
      free_ += barriers_->rows[tail_ % kEntries];
      ++tail_;
    }
    // Not all that the ring holds is asked for at once: a long queue of requests holds up what blocks say to each
    // other.
    while (flying_ > 0 && flying_ + rows > in_flight_) {
      wait_barrier(&barriers_->full[landed_ % kEntries], (landed_ / kEntries) & 1U);
      flying_ -= barriers_->rows[landed_ % kEntries];
      ++landed_;
    }
    flying_ += rows;
    const unsigned entry = head_ % kEntries;
    barriers_->rows[entry] = rows;  // every lane writes the same
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (lane == 0) expect_bytes(&barriers_->full[entry], rows * row_bytes_);
    __syncwarp();
    if (lane < rows) {
      int slot = slot_ + lane;
      if (slot >= slots_) slot -= slots_;
      copy_bulk(ring_ + static_cast<unsigned>(slot * (row_bytes_ + kRowPadding)), row_of(lane), row_bytes_,
                &barriers_->full[entry], policy_);
    }
    slot_ += rows;
    if (slot_ >= slots_) slot_ -= slots_;
    free_ -= rows;
    ++head_;
  }

 private:
  Barriers* barriers_;
  std::uint32_t ring_;
  int slots_, row_bytes_, free_, slot_ = 0;
  unsigned head_ = 0, tail_ = 0;  // entries put, entries known to be read
  int in_flight_, flying_ = 0;    // rows
  unsigned landed_ = 0;           // entries known to have arrived
  std::uint64_t policy_;
};

// The reading end; each consumer's warp has one of its own, and all of them see every entry.
struct RingReader {
  Barriers* barriers;
  const unsigned char* ring;
  int slots, pitch;
  int slot = 0;
  unsigned entry = 0;

  __device__ void wait(unsigned which) const {
    wait_barrier(&barriers->full[which % kEntries], (which / kEntries) & 1U);
  }
  // Slot `rows` behind the current one.
  __device__ int behind(int rows) const { return slot + rows >= slots ? slot + rows - slots : slot + rows; }
  // Address of row i of the entry that begins at slot `first`.
  __device__ const unsigned char* row(int first, int i) const {
    int at = first + i;
    if (at >= slots) at -= slots;
    return ring + at * pitch;
  }
  __device__ void release(int rows) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(&barriers->empty[entry % kEntries]);
    slot = behind(rows);
    ++entry;
  }
};

}  // namespace nanochat_x::cuda
