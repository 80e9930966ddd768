#include "instantiate.cuh"

namespace nanochat_x::cuda {

DecodeKernel int4_kernel(int groups) { return kernel_of<WeightFormat::kInt4>(groups); }

}  // namespace nanochat_x::cuda
