#include "instantiate.cuh"

namespace nanochat_x::cuda {

DecodeKernel bfloat16_kernel(int groups) { return kernel_of<WeightFormat::kBfloat16>(groups); }

}  // namespace nanochat_x::cuda
