#pragma once

// Barriers in shared memory that count arrivals and bytes.

#include <cstdint>

namespace nanochat_x::cuda {

// All of a block's dynamic shared memory. What lies in it is told by offsets: of a pointer that was kept the compiler
// may not know that it is to shared memory.
extern __shared__ __align__(1024) unsigned char shared_memory[];

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

__device__ inline void arrive(std::uint64_t* barrier, int count) {
  asm volatile(
      "{\n .reg .b64 state;\n mbarrier.arrive.shared::cta.b64 state, [%0], %1;\n}" ::"r"(shared_address(barrier)),
      "r"(count)
      : "memory");
}

__device__ inline void expect_bytes(std::uint64_t* barrier, int bytes) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

}  // namespace nanochat_x::cuda
