#include "matmul.h"

#include <cstddef>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>

#include "blaslt.h"
#include "check.h"
#include "device_memory.h"
#include "nanochat_x/error.h"

namespace nanochat_x::cuda {
namespace {

constexpr std::size_t kWorkspace = std::size_t{32} << 20U;  // what NVIDIA advises for Hopper

template <auto DESTROY>
struct Destroy {
  template <typename Object>
  void operator()(Object object) const {
    (void)(BlasLt::loaded().*DESTROY)(object);
  }
};
template <typename Handle, auto DESTROY>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy<DESTROY>>;
using Handle = Owned<cublasLtHandle_t, &BlasLt::destroy>;
using Desc = Owned<cublasLtMatmulDesc_t, &BlasLt::desc_destroy>;
using Layout = Owned<cublasLtMatrixLayout_t, &BlasLt::layout_destroy>;
using Preference = Owned<cublasLtMatmulPreference_t, &BlasLt::preference_destroy>;

Layout layout(cudaDataType_t type, std::int64_t rows, std::int64_t columns) {
  cublasLtMatrixLayout_t made = nullptr;
  check_blaslt(BlasLt::loaded().layout_create(&made, type, static_cast<std::uint64_t>(rows),
                                              static_cast<std::uint64_t>(columns), rows),
               "describing a matrix");
  return Layout(made);
}

// cuBLASLt's matrices are column-major: to it, ours are their transposes, and out^T = weight * x^T.
struct Plan {
  Plan(cublasLtHandle_t handle, Matmul::Output output, std::int64_t rows, std::int64_t n, std::int64_t k)
      : weight(layout(CUDA_R_16BF, k, n)),
        x(layout(CUDA_R_16BF, k, rows)),
        out(layout(output == Matmul::Output::bfloat16 ? CUDA_R_16BF : CUDA_R_32F, n, rows)) {
    const BlasLt& blas = BlasLt::loaded();
    cublasLtMatmulDesc_t made = nullptr;
    check_blaslt(blas.desc_create(&made, CUBLAS_COMPUTE_32F, CUDA_R_32F), "describing a product");
    desc.reset(made);
    const cublasOperation_t transposed = CUBLAS_OP_T;
    check_blaslt(blas.desc_set(made, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed)),
                 "describing a product");
    cublasLtMatmulPreference_t chosen = nullptr;
    check_blaslt(blas.preference_create(&chosen), "describing a product");
    const Preference preference(chosen);
    check_blaslt(blas.preference_set(chosen, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspace, sizeof(kWorkspace)),
                 "describing a product");
    cublasLtMatmulHeuristicResult_t found{};
    int count = 0;
    const cublasStatus_t status =
        blas.heuristic(handle, made, weight.get(), x.get(), out.get(), out.get(), chosen, 1, &found, &count);
    if (status != CUBLAS_STATUS_SUCCESS || count == 0) {
      throw Error("CUDA: cuBLASLt cannot multiply " + std::to_string(rows) + " rows of " + std::to_string(k) +
                  " numbers by a matrix of " + std::to_string(n) + " rows");
    }
    algo = found.algo;
  }

  Layout weight, x, out;
  Desc desc;
  cublasLtMatmulAlgo_t algo{};
};

}  // namespace

struct Matmul::Parts {
  Parts() : workspace(kWorkspace) {
    cublasLtHandle_t made = nullptr;
    check_blaslt(BlasLt::loaded().create(&made), "starting cuBLASLt");
    handle.reset(made);
  }

  Handle handle;
  DeviceArray<std::byte> workspace;
  std::map<std::tuple<Output, std::int64_t, std::int64_t, std::int64_t>, Plan> plans;
};

Matmul::Matmul() : parts_(std::make_unique<Parts>()) {}
Matmul::~Matmul() = default;
Matmul::Matmul(Matmul&&) noexcept = default;
Matmul& Matmul::operator=(Matmul&&) noexcept = default;

void Matmul::multiply(const void* x, const void* weight, void* out, Output output, std::int64_t rows, std::int64_t n,
                      std::int64_t k, void* stream) {
  const cublasLtHandle_t handle = parts_->handle.get();
  const std::tuple key(output, rows, n, k);
  auto plan = parts_->plans.find(key);
  if (plan == parts_->plans.end()) plan = parts_->plans.emplace(key, Plan(handle, output, rows, n, k)).first;
  const Plan& p = plan->second;
  const float alpha = 1, beta = output == Output::add_float32 ? 1 : 0;
  check_blaslt(BlasLt::loaded().matmul(handle, p.desc.get(), &alpha, weight, p.weight.get(), x, p.x.get(), &beta, out,
                                       p.out.get(), out, p.out.get(), &p.algo, parts_->workspace.data(), kWorkspace,
                                       static_cast<cudaStream_t>(stream)),
               "a matrix product");
}

}  // namespace nanochat_x::cuda
