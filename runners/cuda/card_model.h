#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "decoder.h"
#include "device_memory.h"
#include "nanochat_x/bundle.h"
#include "nanochat_x/safetensors.h"

namespace nanochat_x::cuda {

/// A bundle's weights on the card, each once, and what the decoder must know of the model.
class CardModel {
 public:
  /// Reads the manifest's `model` and the weights' file. Throws Error for a bundle that is not bfloat16, has no file of
  /// weights or lacks a tensor, and where the card has no room.
  explicit CardModel(const Bundle& bundle);

  const DecoderModel& model() const { return model_; }

 private:
  void read_constants(const Bundle& bundle);
  void take_layer(const SafetensorsFile& file, std::size_t index);
  const void* matrix(const SafetensorsFile& file, const std::string& name, std::int64_t rows, std::int64_t columns);
  void take_qkv(const SafetensorsFile& file, const std::string& prefix, DecoderLayer& layer);
  const float* floats(const SafetensorsFile& file, const std::string& name, std::int64_t count);

  DecoderModel model_;
  std::vector<bool> has_value_embed_;  // by layer
  bool has_lambdas_ = false;
  std::vector<DeviceArray<std::uint16_t>> matrices_;
  std::vector<DeviceArray<float>> floats_;
};

}  // namespace nanochat_x::cuda
