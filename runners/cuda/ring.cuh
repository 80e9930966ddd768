#pragma once

// The stream of weights: one warp of each block copies them into a ring in shared memory, in the order in which the
// other warps use them, as far ahead as the ring is long. What a block needs is known long before it can be used, so
// the memory works on while blocks wait for each other.

#include <cstdint>

#include "barrier.cuh"
#include "decode_params.h"
#include "entries.h"

namespace nanochat_x::cuda {

// With the producer's they are 12, and a thread can have 168 registers. Of 16 warps a thread can have 128, which is too
// few: some values lay in local memory then.
inline constexpr int kConsumerWarps = 11;
static_assert(kProductWarps == kConsumerWarps - 1, "the last one takes the norm while the others multiply");
inline constexpr int kConsumers = 32 * kConsumerWarps;
inline constexpr int kThreads = kConsumers + 32;
inline constexpr int kEntries = 64;  // of the ring, at most
// What is counted until an entry is free: it comes from each of the warps that read it, or from one thread for all.
inline constexpr int kReadings = 4 * kConsumerWarps;

struct Barriers {
  std::uint64_t full[kEntries], empty[kEntries];
  int room[kEntries], bytes[kEntries];  // of each entry: what it keeps of the ring, what it asks for; the writer's own
};

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

// A box of a matrix, from that column and row on, as its map says.
__device__ inline void copy_box(std::uint32_t to, const CUtensorMap* map, int column, int row, std::uint64_t* barrier,
                                std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

__device__ inline void prefetch_bulk(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Where an entry of `size` bytes lies behind those before it: entries are never in two pieces.
__device__ inline int entry_offset(int next, int size, int ring_bytes) { return next + size > ring_bytes ? 0 : next; }

// The writing end; all 32 lanes of the producer's warp call it together.
class RingWriter {
 public:
  __device__ RingWriter(Barriers* barriers, unsigned char* ring, int ring_bytes, int in_flight)
      : barriers_(barriers),
        ring_(shared_address(ring)),
        ring_bytes_(ring_bytes),
        free_(ring_bytes),
        in_flight_(in_flight),
        policy_(evict_first()) {}

  // One entry of `size` bytes of which `bytes` are copied: by copy(to, barrier, policy), in all lanes.
  template <typename Copy>
  __device__ void put(int size, int bytes, Copy copy) {
    const int at = entry_offset(next_, size, ring_bytes_);
    const int room = at == next_ ? size : size + ring_bytes_ - next_;
    while (free_ < room || head_ - tail_ == kEntries) {
      wait_barrier(&barriers_->empty[tail_ % kEntries], (tail_ / kEntries) & 1U);
      free_ += barriers_->room[tail_ % kEntries];
      ++tail_;
    }
    // Not all that the ring holds is asked for at once: a long queue of requests holds up what blocks say to each
    // other.
    while (flying_ > 0 && flying_ + bytes > in_flight_) {
      wait_barrier(&barriers_->full[landed_ % kEntries], (landed_ / kEntries) & 1U);
      flying_ -= barriers_->bytes[landed_ % kEntries];
      ++landed_;
    }
    const unsigned entry = head_ % kEntries;
    barriers_->room[entry] = room;  // every lane writes the same
    barriers_->bytes[entry] = bytes;
    if (threadIdx.x % 32 == 0) expect_bytes(&barriers_->full[entry], bytes);
    __syncwarp();
    copy(ring_ + static_cast<unsigned>(at), &barriers_->full[entry], policy_);
    next_ = at + size;
    free_ -= room;
    flying_ += bytes;
    ++head_;
  }

 private:
  Barriers* barriers_;
  std::uint32_t ring_;
  int ring_bytes_, free_, next_ = 0;
  unsigned head_ = 0, tail_ = 0;  // entries put, entries known to be read
  int in_flight_, flying_ = 0;    // bytes
  unsigned landed_ = 0;           // entries known to have arrived
  std::uint64_t policy_;
};

// The reading end; each consumer's warp has one of its own, and all of them see every entry.
class RingReader {
 public:
  __device__ RingReader(Barriers* barriers, int ring, int ring_bytes)
      : barriers_(barriers), ring_(ring), ring_bytes_(ring_bytes) {}

  // The next entry, when it is there.
  __device__ const unsigned char* take(int size) {
    const unsigned char* entry = pass(size);
    wait_barrier(&barriers_->full[(taken_ - 1) % kEntries], ((taken_ - 1) / kEntries) & 1U);
    return entry;
  }
  // The next entry, which this warp does not read: it may not be there yet.
  __device__ const unsigned char* pass(int size) {
    const int at = entry_offset(next_, size, ring_bytes_);
    next_ = at + size;
    ++taken_;
    return shared_memory + ring_ + at;
  }
  // This warp, one of `readers`, has read the last `count` entries.
  __device__ void release(int readers, int count) const {
    __syncwarp();
    arrive_at_last(count, kReadings / readers);
  }
  // All warps have read the last `count` entries. By one warp.
  __device__ void release_all(int count) const { arrive_at_last(count, kReadings); }

 private:
  __device__ void arrive_at_last(int count, int readings) const {
    const unsigned lane = threadIdx.x % 32;
    if (lane < static_cast<unsigned>(count)) arrive(&barriers_->empty[(taken_ - 1 - lane) % kEntries], readings);
  }

  Barriers* barriers_;
  int ring_, ring_bytes_, next_ = 0;  // ring_: offset in shared memory
  unsigned taken_ = 0;
};

}  // namespace nanochat_x::cuda
