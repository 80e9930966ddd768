#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "bundle_files.h"
#include "fake_backend.h"
#include "nanochat_x/bundle.h"
#include "temp_dir.h"

namespace nanochat_x::test {

/// A bundle that the toy backend runs: its "programs" are a JSON description of a FakeModel. The tokenizer is the one
/// of single bytes.
class FakeBundle {
 public:
  explicit FakeBundle(const nlohmann::json& model = nlohmann::json::object(), std::int64_t max_seq_len = 400) {
    write_file(dir_ / "fake.json", model.dump());
    write_file(dir_ / "weights.safetensors", kTwoBlocks);
    write_file(dir_ / "tokenizer.json", byte_tokenizer_json());
    nlohmann::json manifest = valid_manifest();
    manifest["model"]["vocab_size"] = 265;
    manifest["max_seq_len"] = max_seq_len;
    manifest["programs"] = {{"prefill", "fake.json"}, {"decode", "fake.json"}, {"full", "fake.json"}};
    write_manifest(manifest);
  }

  /// With sizes and hashes of the files as they are now.
  void write_manifest(nlohmann::json manifest) {
    manifest["files"] = nlohmann::json::array();
    for (const char* path : {"fake.json", "weights.safetensors", "tokenizer.json"}) {
      manifest["files"].push_back(
          {{"path", path}, {"size", std::filesystem::file_size(dir_ / path)}, {"sha256", sha256_file(dir_ / path)}});
    }
    write_manifest_text(dir_.path(), manifest.dump());
  }
  nlohmann::json manifest() const { return nlohmann::json::parse(read_file(dir_ / "manifest.json")); }

  std::filesystem::path path() const { return dir_.path(); }
  std::filesystem::path operator/(std::string_view name) const { return dir_ / name; }

 private:
  TempDir dir_;
};

/// Ids of a text in which "{" and "}" stand for python_start and python_end, "[" and "]" for output_start and
/// output_end, "." for assistant_end; "_" is for a place where what the model wants does not matter.
inline std::vector<TokenId> ids_of(std::string_view text) {
  constexpr std::string_view kMarks = ".{}[]";  // ids 260 to 264
  std::vector<TokenId> ids;
  for (const char c : text) {
    const auto mark = kMarks.find(c);
    ids.push_back(mark == std::string_view::npos ? static_cast<unsigned char>(c) : 260 + static_cast<TokenId>(mark));
  }
  return ids;
}

/// A model that answers with these scripts, in order, around and around.
inline nlohmann::json answering(const std::vector<std::string>& scripts, int step_ms = 0) {
  nlohmann::json model = {{"anchor", 259}, {"step_ms", step_ms}, {"scripts", nlohmann::json::array()}};
  for (const auto& script : scripts) model["scripts"].push_back(ids_of(script));
  return model;
}

}  // namespace nanochat_x::test
