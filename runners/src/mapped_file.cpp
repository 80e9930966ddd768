#include "mapped_file.h"

#include <string>
#include <system_error>

#include "nanochat_x/error.h"
#include "text.h"

#if defined(_WIN32)
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <functional>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <utility>
#endif

namespace nanochat_x::internal {

namespace {

[[noreturn]] void fail(const std::filesystem::path& file, const std::string& what) {
  throw Error(display(file) + ": " + what);
}

#if defined(_WIN32)

class Handle {
 public:
  explicit Handle(HANDLE handle) : handle_(handle) {}
  ~Handle() {
    if (*this) CloseHandle(handle_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  explicit operator bool() const { return handle_ != nullptr && handle_ != INVALID_HANDLE_VALUE; }
  HANDLE get() const { return handle_; }

 private:
  HANDLE handle_;
};

std::string last_error() { return std::system_category().message(static_cast<int>(GetLastError())); }

#else

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

std::string last_error() { return std::generic_category().message(errno); }

#endif

}  // namespace

#if defined(_WIN32)

MappedFile::MappedFile(const std::filesystem::path& file) {
  const Handle handle(
      CreateFileW(file.c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr));
  if (!handle) fail(file, "cannot be opened (" + last_error() + ")");
  LARGE_INTEGER size{};
  if (!GetFileSizeEx(handle.get(), &size)) fail(file, "cannot be read (" + last_error() + ")");
  if (size.QuadPart == 0) return;  // an empty file cannot be mapped
  const Handle mapping(CreateFileMappingW(handle.get(), nullptr, PAGE_READONLY, 0, 0, nullptr));
  if (!mapping) fail(file, "cannot be mapped into memory (" + last_error() + ")");
  data_ = static_cast<const std::byte*>(MapViewOfFile(mapping.get(), FILE_MAP_READ, 0, 0, 0));
  if (data_ == nullptr) fail(file, "cannot be mapped into memory (" + last_error() + ")");
  size_ = static_cast<std::size_t>(size.QuadPart);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) UnmapViewOfFile(data_);
}

bool read_past_mapping(const void*, std::size_t, void*) { return false; }

#else

namespace {

// The files behind the mappings of this process.
class OpenFiles {
 public:
  void add(const std::byte* begin, std::size_t size, Descriptor descriptor) {
    const std::unique_lock lock(mutex_);
    files_.emplace(begin, Entry{size, std::move(descriptor)});
  }
  void remove(const std::byte* begin) {
    const std::unique_lock lock(mutex_);
    files_.erase(begin);
  }
  bool read(const std::byte* from, std::size_t size, std::byte* to) const {
    const std::shared_lock lock(mutex_);
    auto file = files_.upper_bound(from);
    if (file == files_.begin()) return false;
    --file;
    const auto offset = static_cast<std::size_t>(from - file->first);
    if (offset > file->second.size || size > file->second.size - offset) return false;
    for (std::size_t done = 0; done < size;) {
      const ssize_t got =
          pread(file->second.descriptor.get(), to + done, size - done, static_cast<off_t>(offset + done));
      if (got <= 0) return false;
      done += static_cast<std::size_t>(got);
    }
    return true;
  }

 private:
  struct Entry {
    std::size_t size;
    Descriptor descriptor;
  };
  mutable std::shared_mutex mutex_;
  std::map<const std::byte*, Entry, std::less<>> files_;
};

OpenFiles& open_files() {
  static OpenFiles files;
  return files;
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& file) {
  // O_NONBLOCK: opening a FIFO must not wait for its writer; regular files know no such thing.
  Descriptor descriptor(open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (descriptor.get() < 0) fail(file, "cannot be opened (" + last_error() + ")");
  struct stat status{};
  if (fstat(descriptor.get(), &status) != 0) fail(file, "cannot be read (" + last_error() + ")");
  if (!S_ISREG(status.st_mode)) fail(file, "is no file");
  if (status.st_size == 0) return;  // an empty file cannot be mapped
  const auto size = static_cast<std::size_t>(status.st_size);
  void* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor.get(), 0);
  if (data == MAP_FAILED) fail(file, "cannot be mapped into memory (" + last_error() + ")");
  data_ = static_cast<const std::byte*>(data);
  size_ = size;
  open_files().add(data_, size_, std::move(descriptor));
}

MappedFile::~MappedFile() {
  if (data_ == nullptr) return;
  open_files().remove(data_);
  munmap(const_cast<std::byte*>(data_), size_);
}

bool read_past_mapping(const void* from, std::size_t size, void* to) {
  return open_files().read(static_cast<const std::byte*>(from), size, static_cast<std::byte*>(to));
}

#endif

}  // namespace nanochat_x::internal
