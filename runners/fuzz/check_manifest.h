#pragma once

#include <filesystem>
#include <set>
#include <string>
#include <string_view>

#include "demand.h"
#include "manifest.h"
#include "text.h"

namespace nanochat_x::fuzz {

inline void check_path(const std::string& path) {
  const auto relative = internal::path_from_utf8(path);
  demand(!path.empty() && relative.is_relative(), "a path is relative");
  demand(relative.lexically_normal() == relative && *relative.begin() != ".." && *relative.begin() != ".",
         "a path stays in the bundle");
}

/// manifest.json: refused in one line, or a manifest whose sizes and paths the rest may rely on.
template <typename Parse>
void check_manifest(std::string_view text, const Parse& parse) {
  constexpr std::int64_t kMost = 0x7fffffff;
  Manifest manifest;
  const auto schema = refusal([&] { internal::check_schema_version(text, "manifest.json"); });
  const auto refused = refusal([&] { manifest = parse(text, "manifest.json"); });
  if (refused) {
    demand(refused->starts_with("manifest.json"), "an error names the file");
    return;
  }
  demand(!schema, "a schema that is not read is refused");
  for (const std::int64_t size : {manifest.n_layer, manifest.n_kv_head, manifest.head_dim, manifest.vocab_size,
                                  manifest.sequence_len, manifest.max_seq_len}) {
    demand(size >= 1 && size <= kMost, "a size is 1 to 2^31 - 1");
  }
  for (const auto& [name, limit] : manifest.limits) demand(limit >= 1 && limit <= kMost, "a limit is 1 to 2^31 - 1");
  std::set<std::string> listed;
  for (const BundleFile& file : manifest.files) {
    check_path(file.path);
    demand(file.sha256.size() == 64, "a hash has 64 digits");
    demand(listed.insert(file.path).second, "a file is listed once");
  }
  demand(manifest.programs.contains("full"), "there is a program without a cache");
  demand(manifest.programs.contains("prefill") == manifest.programs.contains("decode"), "both cached programs or none");
  for (const auto& [role, path] : manifest.programs) demand(listed.contains(path), "a program is listed");
  demand(listed.contains(manifest.tokenizer), "the tokenizer is listed");
  demand(manifest.weights.empty() || listed.contains(manifest.weights), "the weights are listed");
}

inline void check_manifest(std::string_view text) { check_manifest(text, internal::parse_manifest); }

}  // namespace nanochat_x::fuzz
