#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bundle_files.h"
#include "error_of.h"
#include "model_work.h"
#include "nanochat_x/safetensors.h"

using namespace nanochat_x;
using namespace nanochat_x::test;
using internal::ModelWork;
using nlohmann::json;

namespace {

// valid_manifest(): 4 layers, 6 heads over 3 KV heads of 16, width 96, vocabulary 2048, at most 1024 positions,
// bfloat16.
constexpr std::int64_t kWidth = 96, kKvWidth = 48, kVocab = 2048;

ModelWork work_with(const std::function<void(json&)>& change) {
  const BundleFiles files(change);
  return internal::work_of(Bundle::open(files.path()));
}

// Weights in the programs: counted from the manifest alone.
void inside(json& manifest) { manifest["weights"] = ""; }

// Keys before its own that the query at `position` sees.
std::int64_t seen(std::int64_t position, std::int64_t window) { return std::min(position, window); }

}  // namespace

TEST_CASE("work: a step reads the matrices once, and of each row a table's row and the live cache in its windows") {
  const std::vector<std::int64_t> windows = {5, 100, 0, 1000};
  const ModelWork work = work_with([&](json& manifest) {
    inside(manifest);
    manifest["model"]["windows"] = windows;
  });
  for (const std::int64_t context : {1, 5, 99, 100, 101, 500}) {
    for (const std::int64_t tokens : {1, 2, 128}) {
      CAPTURE(context);
      CAPTURE(tokens);
      std::int64_t keys = 0;
      for (const std::int64_t window : windows) {
        for (std::int64_t step = 0; step < tokens; ++step) keys += seen(context + step, window);
      }
      const double live = static_cast<double>(keys * 2 * kKvWidth * 2) / static_cast<double>(tokens);
      const double one = work.decode_bytes(1, context, tokens), three = work.decode_bytes(3, context, tokens);
      CHECK(one == doctest::Approx(static_cast<double>(work.matrix_bytes + work.row_bytes) + live));
      CHECK(three - one == doctest::Approx(2 * (live + static_cast<double>(work.row_bytes))));
    }
  }
}

TEST_CASE("work: samples read their prompt's live keys once, and each the live ones behind it") {
  const std::vector<std::int64_t> windows = {5, 100, 0, 1000};
  const ModelWork work = work_with([&](json& manifest) {
    inside(manifest);
    manifest["model"]["windows"] = windows;
  });
  for (const std::int64_t prompt : {1, 5, 99, 100, 500}) {
    for (const std::int64_t tokens : {1, 2, 128}) {
      CAPTURE(prompt);
      CAPTURE(tokens);
      std::int64_t common = 0, own = 0;
      for (const std::int64_t window : windows) {
        for (std::int64_t step = 0; step < tokens; ++step) {
          for (std::int64_t key = prompt + step - seen(prompt + step, window); key < prompt + step; ++key) {
            (key < prompt ? common : own) += 1;
          }
        }
      }
      const auto bytes = [&](std::int64_t keys) {
        return static_cast<double>(keys * 2 * kKvWidth * 2) / static_cast<double>(tokens);
      };
      CHECK(work.samples_bytes(1, prompt, tokens) == doctest::Approx(work.decode_bytes(1, prompt, tokens)));
      CHECK(work.samples_bytes(7, prompt, tokens) ==
            doctest::Approx(static_cast<double>(work.matrix_bytes + 7 * work.row_bytes) + bytes(common + 7 * own)));
    }
  }
}

TEST_CASE("work: the operations of a prefill") {
  const std::vector<std::int64_t> windows = {5, 100, 0, 1000};
  const ModelWork work = work_with([&](json& manifest) {
    inside(manifest);
    manifest["model"]["windows"] = windows;
    manifest["model"]["mlp_width"] = 200;
  });
  const std::int64_t block = 4 * (2 * kWidth * kWidth + 2 * kWidth * kKvWidth + 2 * kWidth * 200);
  CHECK(work.block_weights == block);
  for (const std::int64_t tokens : {1, 7, 512}) {
    std::int64_t pairs = 0;  // of a query and a key, each one product and one sum of 96 numbers for scores and values
    for (const std::int64_t window : windows) {
      for (std::int64_t t = 0; t < tokens; ++t) pairs += seen(t, window) + 1;
    }
    const std::int64_t operations = 2 * block * tokens + 2 * kVocab * kWidth + 4 * kWidth * pairs;
    CHECK(work.prefill_operations(1, tokens) == doctest::Approx(static_cast<double>(operations)));
    CHECK(work.prefill_operations(8, tokens) == doctest::Approx(8 * static_cast<double>(operations)));
  }
}

TEST_CASE("work: without windows every key is seen; the cache is all layers' keys and values") {
  const ModelWork none = work_with(inside);
  const ModelWork null = work_with([](json& manifest) {
    inside(manifest);
    manifest["model"]["windows"] = {nullptr, nullptr, nullptr, nullptr};
  });
  for (const ModelWork& work : {none, null}) {
    const double live = 1000.0 * 4 * 2 * kKvWidth * 2;
    CHECK(work.decode_bytes(1, 1000, 1) ==
          doctest::Approx(static_cast<double>(work.matrix_bytes + work.row_bytes) + live));
    CHECK(work.cache_bytes(3, 640) == 4 * 3 * 640 * 2 * kKvWidth * 2);
  }
}

TEST_CASE("work: weights inside the programs have the manifest's width") {
  const std::uint64_t weights =
      4 * (2 * kWidth * kWidth + 2 * kWidth * kKvWidth + 8 * kWidth * kWidth) + kVocab * kWidth;
  const auto bytes = [](const json& quantization, const char* dtype) {
    return work_with([&](json& manifest) {
             inside(manifest);
             manifest["dtype"] = dtype;
             manifest["quantization"] = quantization;
           })
        .matrix_bytes;
  };
  CHECK(bytes(nullptr, "float32") == weights * 4);
  CHECK(bytes(nullptr, "bfloat16") == weights * 2);
  CHECK(bytes({{"bits", 8}, {"group_size", 32}}, "float32") == weights + weights / 16);
  // half a byte, and of each group of 32 a scale of 2 bytes and a zero of one
  CHECK(bytes({{"bits", 4}, {"group_size", 32}}, "float32") == weights / 2 + weights / 32 * 3);
  const auto compact = [](json& manifest) {
    inside(manifest);
    manifest["operators"] = {"attention", "linear_compact"};
  };
  CHECK(work_with(compact).matrix_bytes == weights / 2 * 7);  // 28 bits a weight
  CHECK(work_with(inside).weights_bytes == 3 * kAbc.size());  // the three programs
}

TEST_CASE("work: weights in their file are counted as they are stored") {
  const TempDir dir;
  for (const char* path : {"prefill.so", "decode.so", "full.so", "tokenizer.json"}) write_file(dir / path, kAbc);
  const std::vector<std::byte> zeros(4096);
  const auto tensor = [&](const char* name, const char* dtype, std::vector<std::int64_t> shape, std::size_t size) {
    return TensorToWrite{.name = name, .dtype = dtype, .shape = std::move(shape), .data = std::span(zeros).first(size)};
  };
  const std::vector<TensorToWrite> tensors = {
      tensor("model.lm_head.weight", "I8", {10, 32}, 320),
      tensor("model.lm_head.scales", "F16", {10, 1}, 20),
      tensor("model.transformer.h.0.mlp.c_fc.weight", "U8", {8, 16}, 128),
      tensor("model.transformer.h.0.mlp.c_fc.zeros", "U8", {8, 1}, 8),
      tensor("model.transformer.wte.weight", "BF16", {10, 32}, 640),
      tensor("model.value_embeds.1.weight", "I8", {10, 16}, 160),
      tensor("model.value_embeds.1.scales", "F16", {10, 1}, 20),
      tensor("cos", "F32", {64, 8}, 2048),
      tensor("sin", "F32", {64, 8}, 2048),
  };
  REQUIRE(write_safetensors(dir / "weights.safetensors", tensors));
  json manifest = valid_manifest();
  for (json& file : manifest["files"]) {
    if (file["path"] == "weights.safetensors") file["size"] = std::filesystem::file_size(dir / "weights.safetensors");
  }
  write_manifest_text(dir.path(), manifest.dump());
  const ModelWork work = internal::work_of(Bundle::open(dir.path()));
  CHECK(work.matrix_bytes == 320 + 20 + 128 + 8);
  CHECK(work.row_bytes == 64 + 16 + 2 + 32 + 32);
  CHECK(work.weights_bytes == std::filesystem::file_size(dir / "weights.safetensors"));
}

TEST_CASE("work: what cannot be counted is refused") {
  const auto error = [](const std::function<void(json&)>& change) { return error_of([&] { work_with(change); }); };
  CHECK(contains(error([](json& m) { (void)m; }), "weights.safetensors"));  // is no such file
  CHECK(contains(error([](json& m) { m["model"]["windows"] = {1, 2}; }), "windows: is not one a layer"));
  CHECK(contains(error([](json& m) { m["model"]["windows"] = {1, 2, "x", 4}; }), "windows: holds what is no number"));
  CHECK(contains(error([](json& m) { m["model"]["windows"] = {1, 2, -3, 4}; }), "windows: holds what is no number"));
  CHECK(contains(error([](json& m) { m["model"]["mlp_width"] = 0; }), "mlp_width"));
  CHECK(contains(error([](json& m) { m["quantization"] = {{"bits", 8}}; }), "group_size"));
}
