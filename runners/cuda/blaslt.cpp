#include "blaslt.h"

#include <dlfcn.h>

#include <string>

#include "nanochat_x/error.h"

namespace nanochat_x::cuda {
namespace {

void* open_library() {
  const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
  void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) library = dlopen((NANOCHAT_X_CUDA_LIBRARIES "/" + name).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Error("CUDA: " + name + ", NVIDIA's matrix products, was not found; install cuBLAS of CUDA " +
                std::to_string(CUBLAS_VER_MAJOR) + ", or name its folder in LD_LIBRARY_PATH");
  }
  return library;
}

template <typename Function>
void take(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) throw Error(std::string("CUDA: cuBLASLt lacks ") + name + "; install a newer one");
}

BlasLt load() {
  void* library = open_library();
  BlasLt found;
  take(library, "cublasLtCreate", found.create);
  take(library, "cublasLtDestroy", found.destroy);
  take(library, "cublasLtMatmul", found.matmul);
  take(library, "cublasLtMatmulAlgoGetHeuristic", found.heuristic);
  take(library, "cublasLtMatmulDescCreate", found.desc_create);
  take(library, "cublasLtMatmulDescDestroy", found.desc_destroy);
  take(library, "cublasLtMatmulDescSetAttribute", found.desc_set);
  take(library, "cublasLtMatrixLayoutCreate", found.layout_create);
  take(library, "cublasLtMatrixLayoutDestroy", found.layout_destroy);
  take(library, "cublasLtMatmulPreferenceCreate", found.preference_create);
  take(library, "cublasLtMatmulPreferenceDestroy", found.preference_destroy);
  take(library, "cublasLtMatmulPreferenceSetAttribute", found.preference_set);
  return found;
}

}  // namespace

void check_blaslt(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw Error(std::string("CUDA: ") + what + " failed: cuBLASLt's status is " +
                std::to_string(static_cast<int>(status)));
  }
}

const BlasLt& BlasLt::loaded() {
  static const BlasLt library = load();
  return library;
}

}  // namespace nanochat_x::cuda
