#include "instantiate.cuh"

namespace nanochat_x::cuda {

DecodeKernel int8_kernel(int groups) { return kernel_of<WeightFormat::kInt8>(groups); }

}  // namespace nanochat_x::cuda
