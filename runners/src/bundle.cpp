#include "nanochat_x/bundle.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <fstream>
#include <numeric>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "machine.h"
#include "manifest.h"
#include "nanochat_x/error.h"
#include "sha256.h"
#include "text.h"

namespace nanochat_x {

namespace fs = std::filesystem;
using internal::display;
using internal::in_quotes;

namespace {

constexpr std::uintmax_t kMaxManifestBytes = std::uintmax_t{16} << 20;  // a real one has about 100 kB
constexpr const char* kRemedy = "the bundle is damaged: lower it again";

/// True if the existing `path`, links followed, lies in `root` (canonical).
bool is_inside(const fs::path& root, const fs::path& path) {
  std::error_code error;
  const fs::path real = fs::canonical(path, error);
  if (error) return false;
  const auto [end, rest] = std::mismatch(root.begin(), root.end(), real.begin(), real.end());
  return end == root.end() && rest != real.end();
}

/// Throws Error unless `relative` is a file in `folder`; returns its size.
std::uintmax_t checked_size(const fs::path& folder, const fs::path& root, const std::string& relative) {
  const fs::path path = folder / internal::path_from_utf8(relative);
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status)) throw Error(display(folder) + ": " + in_quotes(relative) + " is missing; " + kRemedy);
  if (!fs::is_regular_file(status))
    throw Error(display(folder) + ": " + in_quotes(relative) + " is no file; " + kRemedy);
  if (!is_inside(root, path)) {
    throw Error(display(folder) + ": " + in_quotes(relative) + " is a link that leaves the bundle; " + kRemedy);
  }
  const std::uintmax_t size = fs::file_size(path, error);
  if (error) throw Error(display(path) + ": cannot be read (" + error.message() + ")");
  return size;
}

fs::path canonical_folder(const fs::path& folder) {
  std::error_code error;
  const fs::file_status status = fs::status(folder, error);
  if (!fs::exists(status))
    throw Error(display(folder) + ": there is no such bundle; give the folder that `lower` wrote");
  if (!fs::is_directory(status)) {
    throw Error(display(folder) +
                ": is no bundle, which is a folder with a manifest.json; give the folder that `lower` wrote");
  }
  fs::path root = fs::canonical(folder, error);
  if (error) throw Error(display(folder) + ": cannot be opened (" + error.message() + ")");
  if (!fs::exists(folder / "manifest.json", error)) {
    throw Error(display(folder) + ": is no bundle, it has no manifest.json; give the folder that `lower` wrote");
  }
  return root;
}

std::string read_text(const fs::path& file, std::uintmax_t size) {
  std::string text(static_cast<std::size_t>(size), '\0');
  std::ifstream stream(file, std::ios::binary);
  stream.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!stream) throw Error(display(file) + ": cannot be read; look at its permissions");
  return text;
}

/// manifest.sha256 holds the hash of the manifest's bytes and a line feed.
void check_manifest_hash(const fs::path& folder, const fs::path& root, const std::string& manifest) {
  const fs::path file = folder / "manifest.sha256";
  const std::uintmax_t size = checked_size(folder, root, "manifest.sha256");
  const std::string text = size == 65 ? read_text(file, size) : std::string();
  if (!text.ends_with('\n') || !internal::is_sha256(std::string_view(text).substr(0, 64))) {
    throw Error(display(file) + ": is not 64 lower-case hexadecimal digits and a line feed; " + kRemedy);
  }
  if (!text.starts_with(internal::sha256_of(manifest))) {
    throw Error(display(folder / "manifest.json") +
                " was changed since it was written (SHA-256 differs); lower the model again");
  }
}

std::string lower_command(const Manifest& manifest) {
  return "`python -m nanochat_x lower --target " + manifest.target + "`";
}

/// What is hashed at once: a whole file, or a block of one.
struct Piece {
  std::size_t file;  ///< index in the list that is checked
  std::uint64_t offset;
  std::optional<std::uint64_t> size;  ///< none: to the file's end, wherever that is by now
  const std::string* sha256;
};

/// Pieces of the largest file first: small ones fit beside the last of it.
std::vector<Piece> pieces_of(const std::vector<const BundleFile*>& files) {
  std::vector<std::size_t> order(files.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return files[a]->size > files[b]->size; });
  std::vector<Piece> pieces;
  for (const std::size_t i : order) {
    const BundleFile& file = *files[i];
    const std::size_t count = file.block_sha256.size();
    if (count == 0) pieces.push_back({.file = i, .offset = 0, .size = {}, .sha256 = &file.sha256});
    for (std::size_t block = 0; block < count; ++block) {
      Piece piece{.file = i, .offset = block * file.block_size, .size = {}, .sha256 = &file.block_sha256[block]};
      if (block + 1 < count) piece.size = file.block_size;
      pieces.push_back(piece);
    }
  }
  return pieces;
}

/// Throws Error naming the first of `files` that is not what the manifest says.
void check_hashes(const Bundle& bundle, const std::vector<const BundleFile*>& files) {
  const std::vector<Piece> pieces = pieces_of(files);
  std::vector<std::exception_ptr> failures(pieces.size());
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t i = next++; i < pieces.size(); i = next++) {
      try {
        const std::string& path = files[pieces[i].file]->path;
        const std::string found = internal::sha256_file(bundle.path_of(path), pieces[i].offset, pieces[i].size);
        if (found != *pieces[i].sha256) {
          throw Error(display(bundle.folder()) + ": " + in_quotes(path) + " differs from what was lowered (SHA-256); " +
                      kRemedy);
        }
      } catch (...) {
        failures[i] = std::current_exception();
      }
    }
  };
  {
    const std::size_t cores = std::max(1U, std::thread::hardware_concurrency());
    std::vector<std::jthread> threads;
    try {
      for (std::size_t i = 1; i < std::min({pieces.size(), cores, std::size_t{8}}); ++i) threads.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads to be had: this one does what they would have done
    }
    work();
  }
  std::size_t first = pieces.size();
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (failures[i] && (first == pieces.size() || pieces[i].file < pieces[first].file)) first = i;
  }
  if (first < pieces.size()) std::rethrow_exception(failures[first]);
}

}  // namespace

Bundle Bundle::open(const fs::path& folder) {
  const fs::path root = canonical_folder(folder);
  const fs::path manifest = folder / "manifest.json";
  const std::uintmax_t manifest_size = checked_size(folder, root, "manifest.json");
  if (manifest_size > kMaxManifestBytes) throw Error(display(manifest) + ": is larger than 16 MiB; " + kRemedy);
  const std::string text = read_text(manifest, manifest_size);
  internal::check_schema_version(text, display(manifest));  // a newer schema may tell the rest in another way
  check_manifest_hash(folder, root, text);
  Bundle bundle;
  bundle.folder_ = fs::absolute(folder);  // programs are loaded later: the working directory may be another then
  bundle.manifest_ = internal::parse_manifest(text, display(manifest));
  for (const BundleFile& file : bundle.manifest_.files) {
    const std::uintmax_t size = checked_size(folder, root, file.path);
    if (size != file.size) {
      throw Error(display(folder) + ": " + in_quotes(file.path) + " has " + std::to_string(size) +
                  " bytes, but the manifest says " + std::to_string(file.size) + "; " + kRemedy);
    }
  }
  return bundle;
}

const BundleFile& Bundle::entry(const std::string& relative) const {
  const auto found = std::ranges::find(manifest_.files, relative, &BundleFile::path);
  if (found == manifest_.files.end()) {
    throw Error(display(folder_) + ": " + in_quotes(relative) + " is not listed in its manifest; lower it again");
  }
  return *found;
}

fs::path Bundle::path_of(const std::string& relative) const {
  return folder_ / internal::path_from_utf8(entry(relative).path);
}

void Bundle::verify_hash(const std::string& relative) const { check_hashes(*this, {&entry(relative)}); }

void Bundle::verify_hashes() const {
  std::vector<const BundleFile*> files;
  for (const BundleFile& file : manifest_.files) files.push_back(&file);
  check_hashes(*this, files);
}

std::vector<MachineCheck> Bundle::machine_checks(std::string_view runtime_version) const {
  const Manifest& m = manifest_;
  const std::string here = internal::platform_name(), arch = internal::architecture_name();
  const std::string lower_here = "lower it on this machine: " + lower_command(m);
  std::vector<MachineCheck> checks;
  const auto add = [&checks](const char* name, const std::string& needed, bool fits, const std::string& problem,
                             const std::string& remedy) {
    checks.push_back({name, internal::printable(needed), fits ? "" : problem, fits ? "" : remedy});
  };
  if (!m.platform.empty()) {
    add("platform", m.platform, internal::canonical_platform(m.platform) == here,
        "was lowered for " + in_quotes(m.platform) + ", this machine runs " + here, lower_here);
  }
  if (!m.architecture.empty()) {
    add("architecture", m.architecture, internal::canonical_architecture(m.architecture) == arch,
        "was lowered for " + in_quotes(m.architecture) + ", this machine is " + arch, lower_here);
  }
  if (!m.cpu_features.empty()) {
    std::string all, lacking;
    for (const std::string& feature : m.cpu_features) {
      all += (all.empty() ? "" : " ") + feature;
      if (!cpu_has_feature(feature)) lacking += (lacking.empty() ? "" : ", ") + internal::printable(feature);
    }
    add("cpu_features", all, lacking.empty(),
        "was lowered for a CPU (" + internal::printable(m.march) + ") with " + internal::printable(lacking) +
            ", which this machine lacks",
        internal::march_remedy(lower_command(m)));
  }
  if (!m.torch_version.empty() && !runtime_version.empty()) {
    add("torch", m.torch_version, internal::major_minor(m.torch_version) == internal::major_minor(runtime_version),
        "was lowered with torch " + internal::printable(m.torch_version) + ", but this program runs libtorch " +
            std::string(runtime_version),
        "lower it again with that torch: " + lower_command(m));
  }
  if (!m.runtime_version.empty() && !runtime_version.empty()) {
    add("runtime", m.runtime_version, !internal::is_older(runtime_version, m.runtime_version),
        "needs version " + internal::printable(m.runtime_version) + " or newer of the " +
            internal::printable(m.target) + " runtime, but this program runs " + std::string(runtime_version),
        "update the runtime and build the runners again");
  }
  return checks;
}

void Bundle::check_machine(std::string_view runtime_version) const {
  for (const MachineCheck& check : machine_checks(runtime_version)) {
    if (!check.fits()) throw Error(display(folder_) + ": " + check.problem + "; " + check.remedy);
  }
}

void Bundle::check_operators(const std::vector<std::string>& known) const {
  for (const std::string& name : manifest_.operators) {
    if (std::ranges::find(known, name) == known.end()) {
      throw Error("the bundle's programs call the operator nanochat_x::" + name +
                  ", which this runner has not; build the runner anew, or lower with --kernels stock");
    }
  }
}

}  // namespace nanochat_x
