#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "nanochat_x/error.h"

namespace nanochat_x::cuda {

/// Throws Error if a call of the CUDA runtime failed: what was tried, and what the runtime says.
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(status));
}

/// Of the current device. Throws Error if there is none.
inline int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "asking for the device");
  check(cudaDeviceGetAttribute(&value, which, device), "asking for an attribute of the device");
  return value;
}

}  // namespace nanochat_x::cuda
