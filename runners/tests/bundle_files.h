#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "nanochat_x/bundle.h"
#include "temp_dir.h"

namespace nanochat_x::test {

// FIPS 180-4's examples: hashes that our code did not compute.
inline const std::string kAbc = "abc";
inline const std::string kAbcHash = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
inline const std::string kTwoBlocks = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
inline const std::string kTwoBlocksHash = "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1";

/// A manifest that any machine accepts, of files with the texts above.
inline nlohmann::json valid_manifest() {
  const auto file = [](const std::string& path, const std::string& text, const std::string& hash) {
    return nlohmann::json{{"path", path}, {"size", text.size()}, {"sha256", hash}};
  };
  nlohmann::json files = nlohmann::json::array();
  for (const char* path : {"prefill.so", "decode.so", "full.so", "tokenizer.json"})
    files.push_back(file(path, kAbc, kAbcHash));
  files.push_back(file("weights.safetensors", kTwoBlocks, kTwoBlocksHash));
  return {
      {"schema_version", 3},
      {"nanochat_x_version", "0.1.0"},
      {"target", "aoti"},
      {"dtype", "bfloat16"},
      {"model",
       {{"generation", "smear"},
        {"n_layer", 4},
        {"n_head", 6},
        {"n_kv_head", 3},
        {"n_embd", 96},
        {"vocab_size", 2048},
        {"sequence_len", 512},
        {"softcap", 15.0}}},
      {"max_seq_len", 1024},
      {"checkpoint", nlohmann::json::object()},
      {"contract", nlohmann::json::object()},
      {"machine",
       {{"platform", ""},
        {"architecture", ""},
        {"march", "x86-64-v3"},
        {"cpu_features", nlohmann::json::array()},
        {"torch_version", "2.13.0+cpu"}}},
      {"programs", {{"prefill", "prefill.so"}, {"decode", "decode.so"}, {"full", "full.so"}}},
      {"weights", "weights.safetensors"},
      {"tokenizer", "tokenizer.json"},
      {"special_tokens", {{"<|bos|>", 2039}}},
      {"verification", nullptr},
      {"files", files},
  };
}

/// Writes manifest.json and the manifest.sha256 that fits it.
inline void write_manifest_text(const std::filesystem::path& folder, std::string_view text) {
  write_file(folder / "manifest.json", text);
  write_file(folder / "manifest.sha256", sha256_file(folder / "manifest.json") + "\n");
}

/// A bundle's folder; `change` edits the manifest before it is written.
class BundleFiles {
 public:
  explicit BundleFiles(const std::function<void(nlohmann::json&)>& change = {}) {
    for (const char* path : {"prefill.so", "decode.so", "full.so", "tokenizer.json"}) write_file(dir_ / path, kAbc);
    write_file(dir_ / "weights.safetensors", kTwoBlocks);
    nlohmann::json manifest = valid_manifest();
    if (change) change(manifest);
    write_manifest_text(dir_.path(), manifest.dump());
  }
  const std::filesystem::path& path() const { return dir_.path(); }
  std::filesystem::path operator/(std::string_view name) const { return dir_ / name; }

 private:
  TempDir dir_;
};

}  // namespace nanochat_x::test
