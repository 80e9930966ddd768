#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace nanochat_x {

/// A file that the manifest lists.
struct BundleFile {
  std::string path;  ///< relative to the bundle, with '/'
  std::string sha256;
  std::uint64_t size = 0;
  std::uint64_t block_size = 0;           ///< 0: it has no blocks
  std::vector<std::string> block_sha256;  ///< of consecutive blocks of that size, the last one shorter
};

/// What the manifest says (docs/bundle.md), checked.
struct Manifest {
  std::int64_t schema_version = 0;
  std::string target;  ///< "aoti", "torchscript", "onnx" or "executorch"
  std::string dtype;   ///< "float32", "bfloat16" or "float16": of the computation and the KV cache
  std::string generation;
  std::int64_t n_layer = 0, n_kv_head = 0, head_dim = 0, vocab_size = 0, sequence_len = 0;
  std::int64_t max_seq_len = 0;  ///< positions that the programs can take
  std::string platform;          ///< "linux", "darwin", "windows"; empty: any
  std::string architecture;      ///< "x86_64", "aarch64"; empty: any
  std::string march;             ///< as given to the compiler
  std::vector<std::string> cpu_features;
  std::string torch_version;                    ///< the programs' own; empty: does not matter to this target
  std::string runtime_version;                  ///< the least that the target's runtime must have; empty: any
  std::map<std::string, std::string> programs;  ///< role ("prefill", "decode", "full", ...) -> path of the file
  std::map<std::string, std::int64_t> limits;   ///< upper bounds of one call; none: those of the contract
  std::vector<std::string> operators;           ///< of this project, that the programs call
  std::string weights;                          ///< path of the safetensors file; empty: inside the programs
  std::string tokenizer;                        ///< path of tokenizer.json
  std::vector<BundleFile> files;

  /// False for a bundle that holds the program without a cache alone (`lower --no-cache`).
  bool is_cached() const { return programs.contains("prefill"); }
};

/// One thing that a bundle's programs need of the machine, and whether it is there.
struct MachineCheck {
  std::string name;             ///< "platform", "architecture", "cpu_features", "torch" or "runtime"
  std::string needed;           ///< as the manifest says it
  std::string problem, remedy;  ///< what does not fit, and the command that mends it; both empty: it fits

  bool fits() const { return problem.empty(); }
};

/// A bundle on disk: its manifest read strictly, every path confined to the folder.
class Bundle {
 public:
  /// Reads manifest.json; checks schema version, its own SHA-256 against manifest.sha256, paths (no '..', no absolute
  /// path, no link that leaves the folder), that every listed file exists with its size, that every file that the
  /// manifest uses is listed. Throws Error.
  static Bundle open(const std::filesystem::path& folder);

  const Manifest& manifest() const { return manifest_; }
  /// Absolute.
  const std::filesystem::path& folder() const { return folder_; }
  /// Where a listed file lies. Throws Error for a path that the manifest does not list.
  std::filesystem::path path_of(const std::string& relative) const;

  /// SHA-256 of every listed file, or of all of its blocks, against the manifest, on several threads. Throws Error
  /// naming the first file that differs.
  void verify_hashes() const;
  /// The same for one listed file: for what is read or run long after all were checked. Throws Error.
  void verify_hash(const std::string& relative) const;
  /// Platform, architecture and instruction set of this machine; that `runtime_version` ("2.13.0"; empty: do not check)
  /// has the major and minor number of the manifest's `torch_version`, and is no older than its `runtime_version`. What
  /// the manifest does not name is left out.
  std::vector<MachineCheck> machine_checks(std::string_view runtime_version) const;
  /// Throws Error with the first of them that does not fit: what the machine lacks and the command that mends it.
  void check_machine(std::string_view runtime_version) const;
  /// Throws Error naming the first of the manifest's `operators` that is not among `known`.
  void check_operators(const std::vector<std::string>& known) const;

 private:
  const BundleFile& entry(const std::string& relative) const;

  Manifest manifest_;
  std::filesystem::path folder_;
};

/// Lower-case hex SHA-256 of a file, read in blocks. Throws Error.
std::string sha256_file(const std::filesystem::path& file);

/// True if this machine's CPU has the feature and its operating system keeps the registers that it needs. Names are
/// the compilers' ("avx2", "sse4.2", "lzcnt", "avx512bf16") or Linux' ("sse4_2", "abm", "avx512_bf16"). An unknown name
/// is a feature that the machine lacks.
bool cpu_has_feature(std::string_view name);

}  // namespace nanochat_x
