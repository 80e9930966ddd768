#pragma once

// Kernels that begin while the one in front of them ends (launch.h).

namespace nanochat_x::cuda {

// From here on the kernel behind this one may begin.
__device__ inline void allow_dependent() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// Until the kernel in front of this one has ended and what it wrote can be read.
__device__ inline void await_dependence() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace nanochat_x::cuda
