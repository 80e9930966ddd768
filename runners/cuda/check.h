#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "nanochat_x/error.h"

namespace nanochat_x::cuda {

/// Throws Error if a call of the CUDA runtime failed: what was tried, and what the runtime says.
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(status));
}

}  // namespace nanochat_x::cuda
