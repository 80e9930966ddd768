#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "check.h"

namespace nanochat_x::cuda {

/// How a kernel is started.
struct Launch {
  dim3 grid;
  unsigned threads;
  cudaStream_t stream;
  std::size_t shared = 0;
  bool dependent = false;  ///< it may begin before the kernel in front of it ends, and waits for that by itself
  unsigned cluster = 1;    ///< blocks of a cluster, along x
};

/// Throws Error if the kernel cannot be started.
template <typename... Parameters, typename... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (how.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {how.cluster, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared;
  config.stream = how.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "starting a kernel");
}

}  // namespace nanochat_x::cuda
