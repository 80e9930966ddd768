#pragma once

// A vector that is multiplied, as products take it: in groups of 32 columns, of 64 bytes each. A warp makes a group, a
// column a lane.
//
// For bfloat16 weights the columns are bfloat16. For weights in 8 and 4 bits they are integers of 16 bits with a step
// of the group's own, as two signed bytes: high * 256 + low, the high bytes of the group first. What that loses is at
// most 2^-16 of the group's largest.

#include <cuda_bf16.h>

#include <cstdint>

#include "barrier.cuh"
#include "entries.h"
#include "packed.cuh"

namespace nanochat_x::cuda {

static_assert(sizeof(GroupInfo) == 16, "it is sent as one");

// In shared memory, from an offset on; infos lie behind the groups.
struct Vector {
  int offset, columns;

  // That of another row: vectors of rows lie one behind the other.
  __device__ Vector row(int which) const { return {offset + which * vector_bytes(columns), columns}; }
  __device__ unsigned char* group(int which) const { return shared_memory + offset + which * kGroupBytes; }
  __device__ GroupInfo& info(int which) const {
    return reinterpret_cast<GroupInfo*>(shared_memory + offset + columns / kGroup * kGroupBytes)[which];
  }
  template <WeightFormat FORMAT>
  __device__ float value(int column) const {
    const unsigned char* own = group(column / kGroup);
    const int at = column % kGroup;
    if constexpr (FORMAT == WeightFormat::kBfloat16) {
      return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(own)[at]);
    } else {
      const auto* bytes = reinterpret_cast<const signed char*>(own);
      return info(column / kGroup).step * static_cast<float>(bytes[at] * 256 + bytes[kGroup + at]);
    }
  }
};

// Writes the lane's column of a group to `group`; all of the warp take part. The squares are left to the caller.
template <WeightFormat FORMAT>
__device__ GroupInfo write_column(unsigned char* group, int column, float value) {
  GroupInfo info{};
  if constexpr (FORMAT == WeightFormat::kBfloat16) {
    reinterpret_cast<__nv_bfloat16*>(group)[column] = __float2bfloat16_rn(value);
  } else {
    const float most = __uint_as_float(__reduce_max_sync(~0U, __float_as_uint(fabsf(value))));
    const int integer = most > 0 ? __float2int_rn(value * __fdividef(32512.0F, most)) : 0;
    group[column] = static_cast<unsigned char>((integer + 128) >> 8);
    group[kGroup + column] = static_cast<unsigned char>(integer);
    info.step = most * (1.0F / 32512.0F);
    info.sum = __reduce_add_sync(~0U, integer);
  }
  return info;
}

}  // namespace nanochat_x::cuda
