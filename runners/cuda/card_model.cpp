#include "card_model.h"

#include <bit>
#include <cstring>
#include <fstream>
#include <iterator>
#include <span>

#include "json_reader.h"
#include "nanochat_x/error.h"
#include "packed_weights.h"
#include "text.h"

namespace nanochat_x::cuda {
namespace {

using internal::ObjectReader;
using nlohmann::json;

constexpr std::int64_t kMost = 0x7fffffff;
const std::string kRemedy = "lower it again";  // NOLINT(cert-err58-cpp)

float number(const ObjectReader& model, const std::string& key) {
  if (!model.has(key) || model.at(key).is_null()) return 0;
  if (!model.at(key).is_number()) model.fail(key, "is no number");
  return model.at(key).get<float>();
}

std::int64_t integer_or(const ObjectReader& model, const std::string& key, std::int64_t otherwise) {
  return model.has(key) && !model.at(key).is_null() ? model.integer(key, 0, kMost) : otherwise;
}

std::int64_t listed(const ObjectReader& model, const std::string& key, const json& value) {
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() > static_cast<std::uint64_t>(kMost)) {
    model.fail(key, "holds what is no number from 0 on");
  }
  return value.get<std::int64_t>();
}

// As float32, which holds every bfloat16.
std::vector<float> widened(const TensorView& tensor, const std::string& name) {
  std::vector<float> values;
  if (tensor.dtype == "F32") {
    values.resize(tensor.data.size() / sizeof(float));
    std::memcpy(values.data(), tensor.data.data(), tensor.data.size());
  } else if (tensor.dtype == "BF16") {
    std::vector<std::uint16_t> bits(tensor.data.size() / 2);
    std::memcpy(bits.data(), tensor.data.data(), tensor.data.size());
    for (const std::uint16_t half : bits) {
      values.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(half) << 16U));
    }
  } else {
    throw Error("the weights' tensor " + name + " is " + tensor.dtype + ", not F32 or BF16; " + kRemedy);
  }
  return values;
}

std::string text_of(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (const std::int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// A tensor's bytes.
std::span<const std::byte> bytes_of(const SafetensorsFile& file, const std::string& name, const std::string& dtype,
                                    const std::vector<std::int64_t>& shape) {
  const TensorView& tensor = file.at(name);
  if (tensor.dtype != dtype || tensor.shape != shape) {
    throw Error("the weights' tensor " + name + " is not " + dtype + " " + text_of(shape) + "; " + kRemedy);
  }
  return tensor.data;
}

}  // namespace

CardModel::CardModel(const Bundle& bundle) {
  const Manifest& manifest = bundle.manifest();
  const std::string where = "bundle '" + bundle.folder().string() + "'";
  if (manifest.dtype != "bfloat16") {
    throw Error(where + " is " + manifest.dtype +
                ", but the CUDA kernels compute in bfloat16; lower it with --dtype bfloat16");
  }
  if (manifest.weights.empty())
    throw Error(where + " has its weights inside its programs; lower it with --target aoti");
  read_constants(bundle);
  if (const char* reason = why_not(model_); *reason != '\0') {
    throw Error(where + " cannot be run by the CUDA kernels: " + reason + "; leave out --device");
  }
  const SafetensorsFile file = SafetensorsFile::open(bundle.path_of(manifest.weights));
  const auto tables = [&](const std::string& name) { return floats(file, name, manifest.max_seq_len * 64); };
  model_.cos = tables("cos");
  model_.sin = tables("sin");
  model_.wte = matrix(file, "model.transformer.wte.weight", model_.vocab, model_.n_embd);
  model_.lm_head = matrix(file, "model.lm_head.weight", model_.vocab, model_.n_embd, &model_.quantized_head);
  if (model_.smear_channels > 0) {
    model_.smear_gate = floats(file, "model.smear_gate.weight", model_.smear_channels);
    model_.smear_lambda = widened(file.at("model.smear_lambda"), "model.smear_lambda").at(0);
  }
  if (model_.backout_layer >= 0) {
    model_.backout_lambda = widened(file.at("model.backout_lambda"), "model.backout_lambda").at(0);
  }
  for (std::size_t i = 0; i < model_.layers.size(); ++i) take_layer(file, i);
  check(cudaDeviceSynchronize(), "copying weights to the card");
}

void CardModel::read_constants(const Bundle& bundle) {
  const auto path = bundle.folder() / "manifest.json";
  const std::string where = internal::display(path);
  std::ifstream stream(path, std::ios::binary);
  const json value = internal::parse_json(std::string{std::istreambuf_iterator<char>(stream), {}}, where, kRemedy);
  const ObjectReader model = ObjectReader(value, where, kRemedy).object("model");
  DecoderModel& m = model_;
  m.n_embd = model.integer("n_embd", 1, kMost);
  m.n_head = model.integer("n_head", 1, kMost);
  m.n_kv_head = bundle.manifest().n_kv_head;
  m.mlp_width = model.integer("mlp_width", 1, kMost);
  m.vocab = bundle.manifest().vocab_size;
  m.norm_eps = number(model, "norm_eps");
  m.qk_scale = number(model, "qk_scale");
  m.softcap = number(model, "softcap");
  m.gate_scale = number(model, "gate_scale");
  m.gate_channels = integer_or(model, "gate_channels", 0);
  m.smear_channels = integer_or(model, "smear_channels", 0);
  m.backout_layer = integer_or(model, "backout_layer", -1);
  if (m.gate_channels > m.n_embd || m.smear_channels > m.n_embd) model.fail("gate_channels", "is more than n_embd");
  if (const ObjectReader whole(value, where, kRemedy);
      whole.has("quantization") && !whole.at("quantization").is_null()) {
    const ObjectReader quantization = whole.object("quantization");
    m.bits = static_cast<int>(quantization.integer("bits", 4, 8));
    m.quant_group = quantization.integer("group_size", 1, kMost);
    if (m.bits != 4 && m.bits != 8) quantization.fail("bits", "is neither 4 nor 8");
  }
  has_lambdas_ = model.has("lambdas") && model.at("lambdas") == true;
  m.layers.resize(static_cast<std::size_t>(bundle.manifest().n_layer));
  has_value_embed_.resize(m.layers.size());
  const json& windows = model.array("windows");
  if (windows.size() != m.layers.size()) model.fail("windows", "is not one a layer");
  for (std::size_t i = 0; i < m.layers.size(); ++i) {
    m.layers[i].window = windows[i].is_null() ? -1 : listed(model, "windows", windows[i]);
  }
  for (const json& layer : model.array("value_embed_layers")) {
    const auto index = static_cast<std::size_t>(listed(model, "value_embed_layers", layer));
    if (index >= m.layers.size()) model.fail("value_embed_layers", "names a layer that is not there");
    has_value_embed_[index] = true;
  }
}

void CardModel::take_layer(const SafetensorsFile& file, std::size_t index) {
  DecoderLayer& layer = model_.layers[index];
  const std::int64_t c = model_.n_embd, kv = model_.n_kv_head * 128;
  const std::string prefix = "model.transformer.h." + std::to_string(index) + ".";
  take_qkv(file, prefix, layer);
  layer.c_proj = matrix(file, prefix + "attn.c_proj.weight", c, c, &layer.quantized.c_proj);
  layer.c_fc = matrix(file, prefix + "mlp.c_fc.weight", model_.mlp_width, c, &layer.quantized.c_fc);
  layer.mlp_c_proj = matrix(file, prefix + "mlp.c_proj.weight", c, model_.mlp_width, &layer.quantized.mlp_c_proj);
  if (has_lambdas_) {
    layer.resid_lambda = widened(file.at("model.resid_lambdas"), "model.resid_lambdas").at(index);
    layer.x0_lambda = widened(file.at("model.x0_lambdas"), "model.x0_lambdas").at(index);
  }
  if (has_value_embed_[index]) {
    layer.value_embed = matrix(file, "model.value_embeds." + std::to_string(index) + ".weight", model_.vocab, kv);
    layer.ve_gate = floats(file, prefix + "attn.ve_gate.weight", model_.n_kv_head * model_.gate_channels);
  }
}

// One behind the other: many tokens are multiplied by all three at once.
void CardModel::take_qkv(const SafetensorsFile& file, const std::string& prefix, DecoderLayer& layer) {
  const std::int64_t c = model_.n_embd, kv = model_.n_kv_head * 128;
  auto& array = matrices_.emplace_back(static_cast<std::size_t>((c + 2 * kv) * c));
  copy_matrix(file, prefix + "attn.c_q.weight", c, c, array.data(), &layer.quantized.c_q);
  copy_matrix(file, prefix + "attn.c_k.weight", kv, c, array.data() + c * c, &layer.quantized.c_k);
  copy_matrix(file, prefix + "attn.c_v.weight", kv, c, array.data() + (c + kv) * c, &layer.quantized.c_v);
  layer.c_q = array.data();
  layer.c_k = array.data() + c * c;
  layer.c_v = array.data() + (c + kv) * c;
}

const void* CardModel::matrix(const SafetensorsFile& file, const std::string& name, std::int64_t rows,
                              std::int64_t columns, QuantizedMatrix* quantized) {
  auto& array = matrices_.emplace_back(static_cast<std::size_t>(rows * columns));
  copy_matrix(file, name, rows, columns, array.data(), quantized);
  return array.data();
}

void CardModel::copy_matrix(const SafetensorsFile& file, const std::string& name, std::int64_t rows,
                            std::int64_t columns, std::uint16_t* to, QuantizedMatrix* quantized) {
  if (model_.bits == 16 || quantized == nullptr) {
    const auto bytes = bytes_of(file, name, "BF16", {rows, columns});
    check(cudaMemcpy(to, bytes.data(), bytes.size(), cudaMemcpyHostToDevice), "copying weights to the card");
    return;
  }
  const std::string stem = name.substr(0, name.size() - std::string("weight").size());
  const bool is_int8 = model_.bits == 8;
  const std::int64_t groups = columns / model_.quant_group;
  quantized->values = keep(file, name, is_int8 ? "I8" : "U8", {rows, is_int8 ? columns : columns / 2});
  quantized->scales = keep(file, stem + "scales", "BF16", {rows, groups});
  if (!is_int8) quantized->zeros = keep(file, stem + "zeros", "U8", {rows, groups});
  round_to_bfloat16(*quantized, model_.bits, model_.quant_group, rows, columns, to);
}

const void* CardModel::keep(const SafetensorsFile& file, const std::string& name, const std::string& dtype,
                            const std::vector<std::int64_t>& shape) {
  return quantized_.emplace_back(bytes_of(file, name, dtype, shape)).data();
}

const float* CardModel::floats(const SafetensorsFile& file, const std::string& name, std::int64_t count) {
  const std::vector<float> values = widened(file.at(name), name);
  if (std::ssize(values) != count) {
    throw Error("the weights' tensor " + name + " has " + std::to_string(values.size()) + " numbers, not " +
                std::to_string(count) + "; " + kRemedy);
  }
  return floats_.emplace_back(std::span<const float>(values)).data();
}

}  // namespace nanochat_x::cuda
