#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace nanochat_x::internal {

/// A file mapped read-only: its pages are the system's file cache and become memory of this process when touched.
/// The file must not shrink while it is mapped.
class MappedFile {
 public:
  /// Throws Error if the file cannot be opened or is no regular file.
  explicit MappedFile(const std::filesystem::path& file);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  /// The whole file; begins at a page's start.
  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace nanochat_x::internal
