#pragma once

#include "decode_params.h"
#include "decoder.h"
#include "device_memory.h"

namespace nanochat_x::cuda {

/// The maps of each layer's matrices of which a cluster takes some columns, on the card. Throws Error if the driver has
/// none.
DeviceArray<TensorMaps> tensor_maps(const DecoderModel& model);

}  // namespace nanochat_x::cuda
