#include "instantiate.cuh"

namespace nanochat_x::cuda {

DecodeKernel int8_kernel(int groups, bool several) { return kernel_of<WeightFormat::kInt8>(groups, several); }

}  // namespace nanochat_x::cuda
