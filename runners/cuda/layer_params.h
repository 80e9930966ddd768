#pragma once

#include <algorithm>
#include <cstdint>

#include "decode_params.h"
#include "decoder.h"

namespace nanochat_x::cuda {

/// A layer as kernels take it.
inline LayerParams layer_params(const DecoderLayer& layer) {
  const auto bf16 = [](const void* pointer) { return static_cast<const __nv_bfloat16*>(pointer); };
  const std::int64_t all = 1 << 30;
  return {bf16(layer.c_q),
          bf16(layer.c_k),
          bf16(layer.c_v),
          bf16(layer.c_proj),
          bf16(layer.c_fc),
          bf16(layer.mlp_c_proj),
          bf16(layer.value_embed),
          layer.ve_gate,
          layer.resid_lambda,
          layer.x0_lambda,
          static_cast<int>(layer.window < 0 ? all : std::min(layer.window, all))};
}

}  // namespace nanochat_x::cuda
