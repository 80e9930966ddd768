#pragma once

// The decode kernel of one format for all widths.

#include <utility>

#include "decode_kernel.cuh"
#include "decode_kernels.h"

namespace nanochat_x::cuda {

template <WeightFormat FORMAT, int ROWS, int... GROUPS>
DecodeKernel kernel_among(int groups, std::integer_sequence<int, GROUPS...>) {
  DecodeKernel found = nullptr;
  ((groups == GROUPS + 1 ? void(found = decode_kernel<FORMAT, GROUPS + 1, ROWS>) : void()), ...);
  return found;
}

template <WeightFormat FORMAT>
DecodeKernel kernel_of(int groups, bool several) {
  constexpr auto kGroups = std::make_integer_sequence<int, warp_groups(kMostWidth)>();
  return several ? kernel_among<FORMAT, kMostRows>(groups, kGroups) : kernel_among<FORMAT, 1>(groups, kGroups);
}

}  // namespace nanochat_x::cuda
