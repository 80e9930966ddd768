#include "instantiate.cuh"

namespace nanochat_x::cuda {

DecodeKernel bfloat16_kernel(int groups, bool several) { return kernel_of<WeightFormat::kBfloat16>(groups, several); }

}  // namespace nanochat_x::cuda
