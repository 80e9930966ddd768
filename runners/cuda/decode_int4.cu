#include "instantiate.cuh"

namespace nanochat_x::cuda {

DecodeKernel int4_kernel(int groups, bool several) { return kernel_of<WeightFormat::kInt4>(groups, several); }

}  // namespace nanochat_x::cuda
