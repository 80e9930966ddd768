#pragma once

#include <vector>

#include "decode_params.h"
#include "decoder.h"
#include "device_memory.h"

namespace nanochat_x::cuda {

/// A model's weights in 8 or 4 bits, in the order in which the blocks of the decode kernel take them.
class PackedWeights {
 public:
  PackedWeights() = default;
  /// Throws Error without memory.
  PackedWeights(const DecoderModel& model, const std::vector<ClusterShare>& shares);

  const PackedStream& stream() const { return stream_; }

 private:
  DeviceArray<unsigned char> layers_, head_;
  PackedStream stream_{};
};

/// Writes the bfloat16 matrix [rows, columns] that is next to what `from`, in `bits` bits and groups of `group`, stands
/// for. Does not wait for the card.
void round_to_bfloat16(const QuantizedMatrix& from, int bits, std::int64_t group, std::int64_t rows,
                       std::int64_t columns, void* to);

}  // namespace nanochat_x::cuda
