#pragma once

#include <cstdint>

#include "decode_params.h"
#include "decoder.h"
#include "device_memory.h"

namespace nanochat_x::cuda {

/// How the copy engine reads boxes of 64 columns and `box_rows` rows of a row-major bfloat16 matrix on the card:
/// swizzled by 128 bytes, and zeros where there are no rows. Throws Error if the driver has no maps.
CUtensorMap matrix_map(const void* matrix, std::int64_t rows, std::int64_t columns, int box_rows);

/// The maps of each layer's matrices of which a cluster takes some columns, on the card. Throws Error if the driver has
/// none.
DeviceArray<TensorMaps> tensor_maps(const DecoderModel& model);

}  // namespace nanochat_x::cuda
