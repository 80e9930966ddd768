#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <memory>

#include "nanochat_x/error.h"
#include "nanochat_x/nanochat.h"
#include "nanochat_x/safetensors.h"
#include "options.h"
#include "process.h"

namespace nanochat_x::app {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

struct ForwardOptions {
  ModelOptions model;
  std::filesystem::path input, output;
  bool no_cache = false;
  std::string chunks;
};

struct Batch {
  std::vector<TokenId> ids;
  std::int64_t rows = 0, length = 0;
};

constexpr std::string_view kInputSuffix = ".input_ids", kOutputSuffix = ".logits";

template <typename Integer>
std::vector<TokenId> as_ids(std::span<const std::byte> bytes) {
  std::vector<Integer> values(bytes.size() / sizeof(Integer));  // a copy: the file need not be aligned
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return {values.begin(), values.end()};
}

Batch read_batch(const TensorView& tensor) {
  if (tensor.dtype != "I64" && tensor.dtype != "I32") {
    throw Error("has dtype " + tensor.dtype + "; token ids are I64 or I32");
  }
  if (tensor.shape.size() != 2 || tensor.shape[0] < 1 || tensor.shape[1] < 1) {
    std::string shape;
    for (const auto size : tensor.shape) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    throw Error("has shape [" + shape + "]; token ids are [B, T] with at least one of each");
  }
  return {.ids = tensor.dtype == "I64" ? as_ids<std::int64_t>(tensor.data) : as_ids<std::int32_t>(tensor.data),
          .rows = tensor.shape[0],
          .length = tensor.shape[1]};
}

// Feeds the columns of `batch` through the cache in pieces of the sizes `chunks`, over and over to the end.
std::vector<float> cached_logits(NanoChat& model, const Batch& batch, const std::vector<std::int64_t>& chunks) {
  Session session = model.new_session(batch.rows);
  const std::int64_t vocab = model.manifest().vocab_size;
  std::vector<float> result(static_cast<std::size_t>(batch.rows * batch.length * vocab));
  std::vector<TokenId> piece;
  std::size_t next_chunk = 0;
  for (std::int64_t begin = 0; begin < batch.length;) {
    const std::int64_t size = std::min(chunks[next_chunk++ % chunks.size()], batch.length - begin);
    piece.clear();
    for (std::int64_t b = 0; b < batch.rows; ++b) {
      const auto row = batch.ids.begin() + b * batch.length + begin;
      piece.insert(piece.end(), row, row + size);
    }
    const Logits logits = session.append(piece, size);
    for (std::int64_t b = 0; b < batch.rows; ++b) {
      const auto from = logits.data.begin() + b * size * vocab;
      std::copy(from, from + size * vocab, result.begin() + (b * batch.length + begin) * vocab);
    }
    begin += size;
  }
  return result;
}

// Ids and lengths of all tensors before the first is computed: `what` of an error names the tensor.
std::map<std::string, Batch> read_batches(const SafetensorsFile& file, const Manifest& manifest,
                                          const std::filesystem::path& where) {
  std::map<std::string, Batch> batches;
  for (const auto& [name, tensor] : file.tensors()) {
    if (name.size() <= kInputSuffix.size() || !name.ends_with(kInputSuffix)) continue;
    try {
      Batch batch = read_batch(tensor);
      if (batch.length > manifest.max_seq_len) {
        throw Error("has sequences of " + std::to_string(batch.length) +
                    " tokens, longer than the model's context of " + std::to_string(manifest.max_seq_len) +
                    "; shorten them, or lower again with a larger --max-seq-len");
      }
      for (const TokenId id : batch.ids) {
        if (id >= 0 && id < manifest.vocab_size) continue;
        throw Error("holds token id " + std::to_string(id) + ", not in the vocabulary (ids 0 to " +
                    std::to_string(manifest.vocab_size - 1) + ")");
      }
      batches[name.substr(0, name.size() - kInputSuffix.size())] = std::move(batch);
    } catch (const Error& error) {
      throw Error("'" + where.string() + "': tensor '" + name + "' " + error.what());
    }
  }
  if (batches.empty()) throw Error("'" + where.string() + "' has no tensor named NAME.input_ids");
  return batches;
}

void check_output(const ForwardOptions& options) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  if (fs::equivalent(options.input, options.output, ignored)) {
    throw Error("'" + options.output.string() + "' is the input itself; give --output another name");
  }
  if (fs::is_directory(options.output, ignored)) {
    throw Error("'" + options.output.string() + "' is a folder; --output is a file's name");
  }
  const fs::path parent = fs::absolute(options.output).parent_path();
  if (!fs::is_directory(parent, ignored)) {
    throw Error("'" + parent.string() + "', where --output should go, is not a folder; make it first");
  }
}

int run_forward(const ForwardOptions& options) {
  const std::vector<std::int64_t> chunks =
      options.chunks.empty() ? std::vector<std::int64_t>{} : parse_integers(options.chunks, "--chunks", 1);
  check_output(options);
  const SafetensorsFile file = SafetensorsFile::open(options.input);
  NanoChat model(options.model.bundle, options.model.backend);
  const auto batches = read_batches(file, model.manifest(), options.input);
  std::map<std::string, std::vector<float>> results;
  std::vector<TensorToWrite> tensors;
  for (const auto& [name, batch] : batches) {
    std::vector<float>& values = results[name];
    if (options.no_cache) {
      const Logits logits = model.forward(batch.ids, batch.rows);
      values.assign(logits.data.begin(), logits.data.end());
    } else {
      values = cached_logits(model, batch, chunks.empty() ? std::vector{batch.length} : chunks);
    }
    tensors.push_back({.name = name + std::string(kOutputSuffix),
                       .dtype = "F32",
                       .shape = {batch.rows, batch.length, model.manifest().vocab_size},
                       .data = std::as_bytes(std::span(values))});
  }
  // Until here nothing is there to be cleaned up, and a signal ends the program.
  const CatchInterrupt interrupt(true);
  return write_safetensors(options.output, tensors, interrupt.flag()) ? 0 : tell_caught_signal();
}

}  // namespace

void add_forward(CLI::App& app, int& exit_code) {
  const auto options = std::make_shared<ForwardOptions>();
  CLI::App* verb = app.add_subcommand("forward", "Logits of token ids, from file to file");
  add_model_options(*verb, options->model);
  verb->add_option("--input", options->input,
                   "safetensors file: of each tensor NAME.input_ids (integers [B, T]) the logits are computed")
      ->required();
  verb->add_option("--output", options->output,
                   "safetensors file to write: NAME.logits (float32 [B, T, vocabulary]); an older one is replaced")
      ->required();
  CLI::Option* no_cache = verb->add_flag("--no-cache", options->no_cache, "Use the program without a KV cache");
  verb->add_option("--chunks", options->chunks,
                   "Feed through the cache in pieces of these sizes (1,7,...), repeated to the end; default: at once")
      ->excludes(no_cache);
  verb->callback([options, &exit_code] { exit_code = run_forward(*options); });
}

}  // namespace nanochat_x::app
