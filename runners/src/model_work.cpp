#include "model_work.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <string_view>

#include "json_reader.h"
#include "nanochat_x/error.h"
#include "nanochat_x/safetensors.h"
#include "text.h"

namespace nanochat_x::internal {
namespace {

using nlohmann::json;

const std::string kRemedy = "lower it again";  // NOLINT(cert-err58-cpp)
constexpr std::int64_t kMaxSize = 0x7fffffff;

// Of the manifest, what only counting wants.
struct Sizes {
  std::int64_t n_embd = 0, n_head = 0, mlp_width = 0;
  std::int64_t value_embeds = 0;     // tables of value embeddings
  std::int64_t bits = 0, group = 0;  // quantised weights; 0: they have the manifest's dtype
  std::vector<std::int64_t> windows;
};

std::vector<std::int64_t> windows_of(const ObjectReader& model, const Manifest& m) {
  std::vector<std::int64_t> windows(static_cast<std::size_t>(m.n_layer), m.max_seq_len);
  if (!model.has("windows")) return windows;
  const json& list = model.array("windows");
  if (list.size() != windows.size()) model.fail("windows", "is not one a layer");
  for (std::size_t i = 0; i < windows.size(); ++i) {
    if (list[i].is_null()) continue;
    if (!list[i].is_number_unsigned()) model.fail("windows", "holds what is no number of tokens");
    windows[i] = static_cast<std::int64_t>(std::min<std::uint64_t>(list[i].get<std::uint64_t>(), kMaxSize));
  }
  return windows;
}

Sizes read_sizes(const Bundle& bundle) {
  const std::filesystem::path file = bundle.folder() / "manifest.json";
  const std::string where = display(file);
  std::ifstream stream(file, std::ios::binary);
  const json value = parse_json(std::string{std::istreambuf_iterator<char>(stream), {}}, where, kRemedy);
  const ObjectReader manifest(value, where, kRemedy);
  const ObjectReader model = manifest.object("model");
  Sizes sizes;
  sizes.n_embd = model.integer("n_embd", 1, kMaxSize);
  sizes.n_head = model.integer("n_head", 1, kMaxSize);
  sizes.mlp_width = model.has("mlp_width") ? model.integer("mlp_width", 1, kMaxSize) : 4 * sizes.n_embd;
  sizes.windows = windows_of(model, bundle.manifest());
  if (model.has("value_embed_layers")) sizes.value_embeds = std::ssize(model.array("value_embed_layers"));
  if (manifest.has("quantization") && !manifest.at("quantization").is_null()) {
    const ObjectReader quantization = manifest.object("quantization");
    sizes.bits = quantization.integer("bits", 1, 32);
    sizes.group = quantization.integer("group_size", 1, kMaxSize);
  }
  return sizes;
}

bool is_table(std::string_view name) {
  return name == "cos" || name == "sin" || name.find("transformer.wte.") != name.npos ||
         name.find("value_embeds.") != name.npos;
}

void count_file(const std::filesystem::path& file, ModelWork& work) {
  const SafetensorsFile weights = SafetensorsFile::open(file);
  for (const auto& [name, tensor] : weights.tensors()) {
    const bool table = is_table(name) && !tensor.shape.empty() && tensor.shape[0] > 0;
    if (table) {
      work.row_bytes += tensor.data.size() / static_cast<std::uint64_t>(tensor.shape[0]);
    } else {
      work.matrix_bytes += tensor.data.size();
    }
  }
}

// Weights of `bits` in groups, each with a scale of 16 bits and, below 8 bits, a zero of 8; or of the manifest's dtype,
// where rows of a multiple of 32 values may be compact: 28 bits a float32 (nanochat_x/compact.py).
double bits_a_weight(const Sizes& sizes, const Manifest& m, std::int64_t depth, std::int64_t element) {
  const bool compact = std::ranges::find(m.operators, "linear_compact") != m.operators.end() && depth % 32 == 0;
  if (sizes.bits == 0) return compact ? 28.0 : 8.0 * static_cast<double>(element);
  const double zero = sizes.bits < 8 ? 8.0 : 0.0;
  return static_cast<double>(sizes.bits) + (16.0 + zero) / static_cast<double>(sizes.group);
}

// Where the weights lie inside a program. A row of bfloat16 embeddings is next to nothing beside the matrices.
void count_sizes(const Sizes& sizes, const Manifest& m, std::int64_t element, ModelWork& work) {
  // Rows are as long as the stream is wide, but for the MLP's second matrices.
  const std::int64_t second = m.n_layer * sizes.n_embd * sizes.mlp_width;
  const auto others = static_cast<double>(work.block_weights + work.head_weights - second);
  const double bits = others * bits_a_weight(sizes, m, sizes.n_embd, element) +
                      static_cast<double>(second) * bits_a_weight(sizes, m, sizes.mlp_width, element);
  work.matrix_bytes = static_cast<std::uint64_t>(bits / 8);
  const std::int64_t embeddings = sizes.n_embd + sizes.value_embeds * m.n_kv_head * m.head_dim;
  work.row_bytes = static_cast<std::uint64_t>(embeddings * 2 + m.head_dim * element);  // the latter: rotary tables
}

// The query at position p sees min(p, window) keys before its own: their sum over `count` positions from `first` on.
double keys_before(std::int64_t first, std::int64_t count, std::int64_t window) {
  const std::int64_t growing = std::clamp(window - first, std::int64_t{0}, count);  // positions below the window
  const auto sum =
      static_cast<double>(growing) * (2.0 * static_cast<double>(first) + static_cast<double>(growing) - 1) / 2;
  return sum + static_cast<double>(count - growing) * static_cast<double>(window);
}

}  // namespace

double ModelWork::decode_bytes(std::int64_t rows, std::int64_t context, std::int64_t tokens) const {
  double keys = 0;
  for (const std::int64_t window : windows) keys += keys_before(context, tokens, window);
  const double cache = keys / static_cast<double>(tokens) * static_cast<double>(kv_bytes);
  return static_cast<double>(matrix_bytes) + static_cast<double>(rows) * (cache + static_cast<double>(row_bytes));
}

double ModelWork::samples_bytes(std::int64_t rows, std::int64_t prompt, std::int64_t tokens) const {
  // Behind the prompt a row sees as many keys of its own as if there were none.
  const double own = decode_bytes(1, 0, tokens) - static_cast<double>(matrix_bytes);
  return decode_bytes(1, prompt, tokens) + static_cast<double>(rows - 1) * own;
}

double ModelWork::prefill_operations(std::int64_t rows, std::int64_t tokens) const {
  double keys = 0;  // each query sees its own key too
  for (const std::int64_t window : windows) keys += keys_before(0, tokens, window) + static_cast<double>(tokens);
  const double products = 2.0 * static_cast<double>(block_weights) * static_cast<double>(tokens) +
                          2.0 * static_cast<double>(head_weights) + 4.0 * static_cast<double>(query_width) * keys;
  return static_cast<double>(rows) * products;
}

std::uint64_t ModelWork::cache_bytes(std::int64_t rows, std::int64_t positions) const {
  return static_cast<std::uint64_t>(std::ssize(windows) * kv_bytes * rows * positions);
}

ModelWork work_of(const Bundle& bundle) {
  const Manifest& m = bundle.manifest();
  const Sizes sizes = read_sizes(bundle);
  const std::int64_t element = m.dtype == "float32" ? 4 : 2, kv_width = m.n_kv_head * m.head_dim;
  ModelWork work;
  work.windows = sizes.windows;
  work.kv_bytes = 2 * kv_width * element;
  work.query_width = sizes.n_embd;
  work.block_weights = m.n_layer * sizes.n_embd * (2 * sizes.n_embd + 2 * kv_width + 2 * sizes.mlp_width);
  work.head_weights = m.vocab_size * sizes.n_embd;
  std::set<std::string> holders = {m.weights};
  if (m.weights.empty()) {
    holders.clear();
    for (const auto& [role, path] : m.programs) holders.insert(path);
  }
  for (const BundleFile& file : m.files) {
    if (holders.contains(file.path)) work.weights_bytes += file.size;
  }
  if (m.weights.empty()) {
    count_sizes(sizes, m, element, work);
  } else {
    count_file(bundle.path_of(m.weights), work);
  }
  return work;
}

}  // namespace nanochat_x::internal
