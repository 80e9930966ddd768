#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "decoder.h"
#include "device_memory.h"
#include "nanochat_x/bundle.h"
#include "nanochat_x/safetensors.h"

namespace nanochat_x::cuda {

/// A bundle's weights on the card, and what the decoder must know of the model. Matrices are in bfloat16, each once; of
/// those that the bundle has in 8 or 4 bits these are what is next to them, and what they are is there too.
class CardModel {
 public:
  /// Reads the manifest's `model` and the weights' file. Throws Error for a bundle that is not bfloat16, has no file of
  /// weights or lacks a tensor, and where the card has no room.
  explicit CardModel(const Bundle& bundle);

  const DecoderModel& model() const { return model_; }
  /// Gives back the card's memory of weights in 8 and 4 bits, which a Decoder has packed anew; what `quantized` of the
  /// model points to is gone.
  void drop_quantized() { quantized_.clear(); }

 private:
  void read_constants(const Bundle& bundle);
  void take_layer(const SafetensorsFile& file, std::size_t index);
  /// `quantized`: filled in, if the bundle has the matrix so; null for what is never so.
  const void* matrix(const SafetensorsFile& file, const std::string& name, std::int64_t rows, std::int64_t columns,
                     QuantizedMatrix* quantized = nullptr);
  void copy_matrix(const SafetensorsFile& file, const std::string& name, std::int64_t rows, std::int64_t columns,
                   std::uint16_t* to, QuantizedMatrix* quantized);
  const void* keep(const SafetensorsFile& file, const std::string& name, const std::string& dtype,
                   const std::vector<std::int64_t>& shape);
  void take_qkv(const SafetensorsFile& file, const std::string& prefix, DecoderLayer& layer);
  const float* floats(const SafetensorsFile& file, const std::string& name, std::int64_t count);

  DecoderModel model_;
  std::vector<bool> has_value_embed_;  // by layer
  bool has_lambdas_ = false;
  std::vector<DeviceArray<std::uint16_t>> matrices_;
  std::vector<DeviceArray<float>> floats_;
  std::vector<DeviceArray<std::byte>> quantized_;
};

}  // namespace nanochat_x::cuda
