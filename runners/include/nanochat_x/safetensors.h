#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace nanochat_x {

/// One tensor of a safetensors file; `data` points into the mapped file.
struct TensorView {
  std::string dtype;  ///< "F32", "BF16", "F16", "I64", "I32", ...
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;
};

/// A safetensors file, memory-mapped read-only (mmap, on Windows a file mapping) and read strictly: a malformed header,
/// overlapping or misplaced ranges, an unknown dtype or a length that does not match the shape throws Error.
class SafetensorsFile {
 public:
  static SafetensorsFile open(const std::filesystem::path& file);
  const std::map<std::string, TensorView>& tensors() const { return tensors_; }
  /// Throws Error if there is none of that name.
  const TensorView& at(const std::string& name) const;

 private:
  std::map<std::string, TensorView> tensors_;
  std::shared_ptr<const void> mapping_;
  std::string where_;
};

/// A tensor to be written.
struct TensorToWrite {
  std::string name, dtype;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;
};

/// Writes to a temporary name beside `file`, then renames. Throws Error; leaves nothing behind when it does.
/// `interrupt`, set from elsewhere (a signal), ends it within 16 MB; false then, with nothing left behind either.
bool write_safetensors(const std::filesystem::path& file, std::span<const TensorToWrite> tensors,
                       const std::atomic<bool>* interrupt = nullptr);

}  // namespace nanochat_x
