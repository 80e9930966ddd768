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

/// Copies `size` bytes at `from` to `to`, where they lie in a MappedFile that is there, out of the file and not through
/// its mapping. False, and nothing to be relied on at `to`, if they lie in none or the file cannot be read so.
///
/// Of tables, of which a call reads a row here and there: to read one through the mapping makes the pages around it (64
/// KiB with Linux's defaults) memory of this process, too.
bool read_past_mapping(const void* from, std::size_t size, void* to);

}  // namespace nanochat_x::internal
