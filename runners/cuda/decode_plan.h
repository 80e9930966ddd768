#pragma once

#include <cstdint>
#include <vector>

#include "decode_params.h"
#include "decoder.h"

namespace nanochat_x::cuda {

/// Deals a layer's work out to so many clusters: each has a part of the inside of the MLP, the first ones KV heads.
std::vector<ClusterShare> deal_out(const DecoderModel& model, int clusters);

/// Where things lie in the shared memory of `shared_bytes` bytes, behind `fixed_bytes`, when so many rows are decoded
/// at once. `ring_bytes` is 0 if there is no room for the ring.
BlockLayout block_layout(const DecoderModel& model, const std::vector<ClusterShare>& shares, WeightFormat format,
                         int rows, int fixed_bytes, int shared_bytes);

}  // namespace nanochat_x::cuda
