#pragma once

// Messages between the blocks of a cluster: a block writes into the shared memory of another, and the bytes that have
// come are counted by a barrier there. Whoever waits for the barrier has them.

#include <cstdint>

#include "barrier.cuh"
#include "decode_params.h"

namespace nanochat_x::cuda {

__device__ inline int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster: what they did before they came is done for who has waited.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The address, in the block of that rank, of what this block has at `own`.
__device__ inline std::uint32_t address_at(std::uint32_t own, int rank) {
  std::uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(rank));
  return there;
}

// What all ranks together send to each: one message of a known size a turn.
class Inbox {
 public:
  __device__ Inbox(std::uint64_t* barrier, int bytes) : barrier_(barrier), bytes_(bytes) {}

  // By one thread, before any rank can send.
  __device__ void open() const {
    init_barrier(barrier_, 1);
    expect_bytes(barrier_, bytes_);
  }
  // Until the message of this turn, from 0 on, is there. The next one can only come when all have read it.
  __device__ void await(unsigned turn) const {
    wait_barrier(barrier_, turn & 1U);
    if (threadIdx.x == 0) expect_bytes(barrier_, bytes_);
  }
  // To `to` in this block's memory, but at `rank`. Few large ones: each is counted by itself.
  __device__ void send(const void* to, const uint4& value, int rank) const {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     address_at(shared_address(to), rank)),
                 "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(address_at(shared_address(barrier_), rank))
                 : "memory");
  }
  __device__ void send(const void* to, float value, int rank) const {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                     address_at(shared_address(to), rank)),
                 "r"(__float_as_uint(value)), "r"(address_at(shared_address(barrier_), rank))
                 : "memory");
  }

 private:
  std::uint64_t* barrier_;
  int bytes_;
};

}  // namespace nanochat_x::cuda
