#include "tensor_maps.h"

#include <cuda_runtime_api.h>

#include <vector>

#include "check.h"
#include "entries.h"

namespace nanochat_x::cuda {
namespace {

constexpr int kBoxColumns = Entries<WeightFormat::kBfloat16>::kBoxColumns;

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's library is not linked: the runtime finds it.
Encode encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
        "asking the driver for tensor maps");
  if (result != cudaDriverEntryPointSuccess) throw Error("CUDA: this driver has no tensor maps; install a newer one");
  return reinterpret_cast<Encode>(found);
}

}  // namespace

CUtensorMap matrix_map(const void* matrix, std::int64_t rows, std::int64_t columns, int box_rows) {
  static const Encode encode = encoder();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {2 * sizes[0]};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  CUtensorMap map{};
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, row_bytes,
                                 box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw Error("CUDA: a matrix cannot be mapped: error " + std::to_string(status));
  return map;
}

DeviceArray<TensorMaps> tensor_maps(const DecoderModel& model) {
  std::vector<TensorMaps> maps;
  for (const DecoderLayer& layer : model.layers) {
    maps.push_back({matrix_map(layer.c_proj, model.n_embd, model.n_embd, kNarrowRows),
                    matrix_map(layer.mlp_c_proj, model.n_embd, model.mlp_width, kNarrowRows)});
  }
  return DeviceArray<TensorMaps>(std::span<const TensorMaps>(maps));
}

}  // namespace nanochat_x::cuda
