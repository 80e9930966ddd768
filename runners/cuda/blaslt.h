#pragma once

#include <cublasLt.h>

#include <memory>

namespace nanochat_x::cuda {

/// Throws Error if a call of cuBLASLt failed: what was tried, and the status.
void check_blaslt(cublasStatus_t status, const char* what);

/// The functions of cuBLASLt that are used here. The library has half a gigabyte, so a program loads it when it needs
/// it, and starts on a machine that lacks it.
struct BlasLt {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtDestroy) destroy = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;
  decltype(&cublasLtMatmulDescCreate) desc_create = nullptr;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) layout_create = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set = nullptr;

  /// The library of the toolkit's major version: where the loader looks, else in the toolkit that this was compiled
  /// with. It stays loaded to the end of the process. Throws Error if it is in neither place.
  static const BlasLt& loaded();
};

}  // namespace nanochat_x::cuda
