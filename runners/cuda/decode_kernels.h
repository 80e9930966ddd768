#pragma once

#include "decode_params.h"
#include "ring.cuh"

namespace nanochat_x::cuda {

/// Groups of 32 columns that a warp multiplies of so many. A kernel is compiled for each number.
constexpr int warp_groups(int width) { return (width / kGroup + kProductWarps - 1) / kProductWarps; }

using DecodeKernel = void (*)(DecodeParams);

/// The kernel for that many, of one row or of several. Each format is compiled by itself: it takes minutes on few
/// cores.
DecodeKernel bfloat16_kernel(int groups, bool several);
DecodeKernel int8_kernel(int groups, bool several);
DecodeKernel int4_kernel(int groups, bool several);

}  // namespace nanochat_x::cuda
