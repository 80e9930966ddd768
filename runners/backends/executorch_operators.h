#pragma once

#include <string>
#include <vector>

namespace nanochat_x::executorch_operators {

/// Puts the kernels of `names()` into ExecuTorch's registry, as `nanochat_x::NAME.out`; again, it does nothing. They
/// work on threads of their own (executorch_threads.h). A call whose arguments do not fit fails, and `take_error` says
/// why.
void add_to_registry();

/// Names of the operators, as a manifest's `operators` lists those that its programs call.
const std::vector<std::string>& names();

/// Why an operator failed last on this thread; empty if none did since it was asked.
std::string take_error();

}  // namespace nanochat_x::executorch_operators
