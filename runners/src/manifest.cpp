#include "manifest.h"

#include <algorithm>
#include <array>
#include <set>

#include "json_reader.h"
#include "nanochat_x/error.h"
#include "sha256.h"
#include "text.h"

namespace nanochat_x::internal {

using nlohmann::json;

namespace {

const std::string kRemedy = "lower it again";  // NOLINT(cert-err58-cpp)

// Far above every real size, and small enough that a product of two never overflows.
constexpr std::int64_t kMaxSize = 0x7fffffff;

/// Before anything else: what the other keys mean depends on it.
void check_schema_version(const ObjectReader& manifest, const std::string& where) {
  const json& version = manifest.at("schema_version");
  if (!version.is_number_integer()) manifest.fail("schema_version", "must be an integer");
  const bool newer = version.is_number_unsigned() && version.get<std::uint64_t>() > std::uint64_t{kSchemaVersion};
  if (newer) {
    throw Error(where + ": has schema version " + version.dump() + ", but this runner reads schema " +
                std::to_string(kSchemaVersion) + "; update nanochat_x");
  }
  if (version.get<std::int64_t>() != kSchemaVersion) {
    manifest.fail("schema_version",
                  "is " + version.dump() + ", and this runner reads " + std::to_string(kSchemaVersion));
  }
}

std::string one_of(const ObjectReader& object, const std::string& key, std::initializer_list<const char*> choices) {
  std::string value = object.string(key);
  if (std::find(choices.begin(), choices.end(), value) != choices.end()) return value;
  std::string list;
  for (const char* choice : choices) list += (list.empty() ? "" : ", ") + std::string(choice);
  object.fail(key, "is " + in_quotes(value) + ", not one of " + list);
}

std::string not_empty(const ObjectReader& object, const std::string& key) {
  std::string value = object.string(key);
  if (value.empty()) object.fail(key, "is empty");
  return value;
}

/// Nothing if `path` can only name something below the folder (links apart), else what is wrong with it.
/// ':' is a drive or a stream on Windows and '\\' a separator there: a bundle means the same everywhere.
const char* path_fault(std::string_view path) {
  if (path.empty()) return "is an empty path";
  if (path.front() == '/') return "is an absolute path";
  if (path.size() > 1024) return "is a path of more than 1024 bytes";
  for (const char c : path) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) return "is a path with a control character";
    if (c == '\\') return "is a path with a backslash";
    if (c == ':') return "is a path with a colon";
  }
  for (std::size_t begin = 0; begin <= path.size();) {
    const std::size_t end = std::min(path.find('/', begin), path.size());
    const std::string_view part = path.substr(begin, end - begin);
    if (part == "..") return "leaves the bundle with '..'";
    if (part.empty() || part == ".") return "is a path with an empty part or '.'";
    begin = end + 1;
  }
  return nullptr;
}

std::string relative_path(const ObjectReader& object, const std::string& key) {
  std::string path = object.string(key);
  if (const char* fault = path_fault(path)) object.fail(key, in_quotes(path) + " " + fault);
  return path;
}

void read_model(const ObjectReader& model, Manifest& out) {
  out.generation = not_empty(model, "generation");
  out.n_layer = model.integer("n_layer", 1, kMaxSize);
  out.n_kv_head = model.integer("n_kv_head", 1, kMaxSize);
  out.vocab_size = model.integer("vocab_size", 1, kMaxSize);
  out.sequence_len = model.integer("sequence_len", 1, kMaxSize);
  const std::int64_t n_embd = model.integer("n_embd", 1, kMaxSize);
  const std::int64_t n_head = model.integer("n_head", 1, kMaxSize);
  if (n_embd % n_head != 0) model.fail("n_embd", "is no multiple of n_head");
  if (n_head % out.n_kv_head != 0) model.fail("n_head", "is no multiple of n_kv_head");
  out.head_dim = n_embd / n_head;
}

/// A key may be left out where it does not matter to the target: "any". AOTInductor's programs are machine code linked
/// to one libtorch, so for them only the list of features may be (the architecture's baseline then).
void read_machine(const ObjectReader& machine, Manifest& out) {
  const auto read = [&](const std::string& key) {
    return out.target == "aoti" || machine.has(key) ? machine.string(key) : std::string();
  };
  out.platform = read("platform");
  out.architecture = read("architecture");
  out.march = read("march");
  out.torch_version = read("torch_version");
  if (machine.has("runtime_version")) out.runtime_version = machine.string("runtime_version");
  if (machine.has("cpu_features")) out.cpu_features = machine.strings("cpu_features");
}

void read_blocks(const ObjectReader& blocks, BundleFile& out) {
  out.block_size = static_cast<std::uint64_t>(blocks.integer("size", 1));
  out.block_sha256 = blocks.strings("sha256");
  const std::uint64_t count = out.size / out.block_size + (out.size % out.block_size != 0 ? 1 : 0);
  if (out.block_sha256.size() != count) {
    blocks.fail("sha256",
                "has " + std::to_string(out.block_sha256.size()) + " hashes of " + std::to_string(count) + " blocks");
  }
  if (!std::ranges::all_of(out.block_sha256, is_sha256)) {
    blocks.fail("sha256", "must hold 64 lower-case hexadecimal digits each");
  }
}

BundleFile read_file(const ObjectReader& file) {
  BundleFile out;
  out.path = relative_path(file, "path");
  out.size = static_cast<std::uint64_t>(file.integer("size", 0));
  out.sha256 = file.string("sha256");
  if (!is_sha256(out.sha256)) file.fail("sha256", "must be 64 lower-case hexadecimal digits");
  if (file.has("blocks")) read_blocks(file.object("blocks"), out);
  return out;
}

void read_files(const ObjectReader& manifest, const std::string& where, Manifest& out) {
  std::set<std::string> seen;
  std::size_t index = 0;
  for (const json& entry : manifest.array("files")) {
    const std::string key = "files[" + std::to_string(index++) + "]";
    out.files.push_back(read_file(ObjectReader(entry, where, kRemedy, key)));
    const std::string& path = out.files.back().path;
    if (path == "manifest.json") manifest.fail(key, "lists manifest.json, which cannot hold its own hash");
    if (path == "manifest.sha256") manifest.fail(key, "lists manifest.sha256, which is made of the manifest");
    if (!seen.insert(path).second) manifest.fail(key, "lists " + in_quotes(path) + " a second time");
  }
}

void read_programs(const ObjectReader& manifest, Manifest& out) {
  const ObjectReader programs = manifest.object("programs");
  for (const std::string& role : programs.keys()) out.programs[role] = relative_path(programs, role);
  if (out.programs.empty()) manifest.fail("programs", "is empty");
  // `full` alone is a whole bundle too: what `lower --no-cache` writes
  const bool cached = out.programs.contains("prefill") || out.programs.contains("decode");
  for (const char* role : {"prefill", "decode", "full"}) {
    if (cached || std::string_view(role) == "full") (void)programs.at(role);
  }
}

void read_limits(const ObjectReader& manifest, Manifest& out) {
  if (!manifest.has("limits")) return;
  const ObjectReader limits = manifest.object("limits");
  for (const std::string& name : limits.keys()) out.limits[name] = limits.integer(name, 1, kMaxSize);
}

/// What the runner does not need, but the format promises: a manifest without it was not written whole.
void check_the_rest(const ObjectReader& manifest) {
  (void)not_empty(manifest, "nanochat_x_version");
  (void)manifest.object("checkpoint");
  (void)manifest.object("contract");
  const ObjectReader special = manifest.object("special_tokens");
  for (const std::string& name : special.keys()) (void)special.integer(name, 0, kMaxSize);
  if (!manifest.at("verification").is_null()) (void)manifest.object("verification");
}

void check_listed(const ObjectReader& manifest, const Manifest& out, const std::string& key, const std::string& path) {
  const bool listed =
      std::any_of(out.files.begin(), out.files.end(), [&](const BundleFile& file) { return file.path == path; });
  if (!listed) manifest.fail(key, in_quotes(path) + " is not listed in files");
}

}  // namespace

void check_schema_version(std::string_view text, const std::string& where) {
  const json value = parse_json(text, where, kRemedy);
  check_schema_version(ObjectReader(value, where, kRemedy), where);
}

Manifest parse_manifest(std::string_view text, const std::string& where) {
  const json value = parse_json(text, where, kRemedy);
  const ObjectReader manifest(value, where, kRemedy);
  check_schema_version(manifest, where);

  Manifest out;
  out.schema_version = manifest.integer("schema_version", 1);
  out.target = one_of(manifest, "target", {"aoti", "torchscript", "onnx", "executorch"});
  out.dtype = one_of(manifest, "dtype", {"float32", "bfloat16", "float16"});
  read_model(manifest.object("model"), out);
  out.max_seq_len = manifest.integer("max_seq_len", 1, kMaxSize);
  read_machine(manifest.object("machine"), out);
  read_programs(manifest, out);
  read_limits(manifest, out);
  if (manifest.has("operators")) out.operators = manifest.strings("operators");
  // "" says that the weights are inside the programs
  if (!manifest.string("weights").empty()) out.weights = relative_path(manifest, "weights");
  out.tokenizer = relative_path(manifest, "tokenizer");
  check_the_rest(manifest);
  read_files(manifest, where, out);

  for (const auto& [role, path] : out.programs) check_listed(manifest, out, "programs." + role, path);
  if (!out.weights.empty()) check_listed(manifest, out, "weights", out.weights);
  check_listed(manifest, out, "tokenizer", out.tokenizer);
  return out;
}

}  // namespace nanochat_x::internal
