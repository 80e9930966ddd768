#pragma once

#include "decode_params.h"
#include "ring.cuh"

namespace nanochat_x::cuda {

inline constexpr int kMostWidth = 2048;  // of the residual stream

/// Groups of 32 columns that a warp multiplies of so many. A kernel is compiled for each number.
constexpr int warp_groups(int width) { return (width / kGroup + kProductWarps - 1) / kProductWarps; }

using DecodeKernel = void (*)(DecodeParams);

/// The kernel for that many. Each format is compiled by itself: it takes minutes on few cores.
DecodeKernel bfloat16_kernel(int groups);
DecodeKernel int8_kernel(int groups);
DecodeKernel int4_kernel(int groups);

}  // namespace nanochat_x::cuda
