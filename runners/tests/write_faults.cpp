// Preloaded into a process (LD_PRELOAD), this counts what the process changes below one folder (files made and written,
// folders, renames, removals), and at the n-th change kills the process or lets it find the disk full.
// tests/lower_server.py arms it by the functions at the end.

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>

namespace {

enum Kind : int { kCountOnly = 0, kKill = 1, kKillWithin = 2, kDiskFull = 3, kDiskFullOnce = 4 };

std::string& folder() {
  static std::string path;
  return path;
}
std::atomic<long> seen{0};
std::atomic<long> strike_at{0};
std::atomic<int> kind{-1};  // not armed

/// What is to become of a change.
enum class Fate { done, half, fails };

/// Counts a change below the folder. A change that gives room back is possible on a full disk too.
Fate next_fate(bool gives_room = false) {
  const long number = ++seen;
  const bool now = number == strike_at;
  switch (kind.load()) {
    case kKill:
      if (now) raise(SIGKILL);
      return Fate::done;
    case kKillWithin:
      return now ? Fate::half : Fate::done;
    case kDiskFull:
      if (gives_room || number < strike_at) return Fate::done;
      return now ? Fate::half : Fate::fails;
    case kDiskFullOnce:
      return now && !gives_room ? Fate::fails : Fate::done;
    default:
      return Fate::done;
  }
}

bool dies() { return kind == kKillWithin; }

int no_space() {
  errno = ENOSPC;
  return -1;
}

std::string link_target(const std::string& link) {
  std::array<char, PATH_MAX> buffer{};
  const ssize_t length = readlink(link.c_str(), buffer.data(), buffer.size());
  return length < 0 ? std::string() : std::string(buffer.data(), static_cast<std::size_t>(length));
}

bool is_below(const std::string& path) {
  return kind >= 0 && path.starts_with(folder()) && (path.size() == folder().size() || path[folder().size()] == '/');
}

bool is_below(int descriptor) {
  return kind >= 0 && is_below(link_target("/proc/self/fd/" + std::to_string(descriptor)));
}

bool is_below(int at, const char* path) {
  if (kind < 0) return false;
  if (path[0] == '/') return is_below(std::string(path));
  const std::string base = link_target(at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/" + std::to_string(at));
  return is_below(base + "/" + path);
}

/// The function that this one stands in front of.
template <typename Function>
Function* real(Function*, const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}
#define REAL(name) real(&::name, #name)

/// A change that is made whole or not at all.
template <typename Call>
int change(bool counts, bool gives_room, Call&& call) {
  if (!counts) return call();
  const Fate fate = next_fate(gives_room);
  if (fate == Fate::done) return call();
  if (!dies()) return no_space();
  call();
  raise(SIGKILL);
  return -1;
}

/// A write of `size` bytes by `call(bytes)`: half of it can be done.
template <typename Call>
ssize_t partial(int descriptor, std::size_t size, Call&& call) {
  if (!is_below(descriptor)) return call(size);
  const Fate fate = next_fate();
  if (fate == Fate::done) return call(size);
  if (fate == Fate::fails || (size < 2 && !dies())) return no_space();
  const ssize_t written = call(size / 2);
  if (dies()) raise(SIGKILL);
  return written;
}

template <typename Open>
int opened(Open* function, int at, const char* path, int flags, mode_t mode, bool with_at) {
  const bool makes = (flags & (O_CREAT | O_TRUNC)) != 0 && (flags & O_ACCMODE) != O_RDONLY;
  return change(makes && is_below(at, path), false, [&] {
    if constexpr (std::is_invocable_v<Open*, int, const char*, int, mode_t>) {
      return function(at, path, flags, mode);
    } else {
      (void)with_at;
      return function(path, flags, mode);
    }
  });
}

mode_t mode_of(int flags, va_list arguments) {
  return (flags & (O_CREAT | O_TMPFILE)) != 0 ? static_cast<mode_t>(va_arg(arguments, int)) : 0;
}

}  // namespace

extern "C" {

#define DEFINE_OPEN(name)                                          \
  int name(const char* path, int flags, ...) {                     \
    va_list arguments;                                             \
    va_start(arguments, flags);                                    \
    const mode_t mode = mode_of(flags, arguments);                 \
    va_end(arguments);                                             \
    return opened(REAL(name), AT_FDCWD, path, flags, mode, false); \
  }
#define DEFINE_OPENAT(name)                                 \
  int name(int at, const char* path, int flags, ...) {      \
    va_list arguments;                                      \
    va_start(arguments, flags);                             \
    const mode_t mode = mode_of(flags, arguments);          \
    va_end(arguments);                                      \
    return opened(REAL(name), at, path, flags, mode, true); \
  }
DEFINE_OPEN(open)
DEFINE_OPEN(open64)
DEFINE_OPENAT(openat)
DEFINE_OPENAT(openat64)

#define DEFINE_FOPEN(name)                                                                     \
  FILE* name(const char* path, const char* mode) {                                             \
    FILE* file = nullptr;                                                                      \
    const bool makes = std::strchr(mode, 'w') != nullptr || std::strchr(mode, 'a') != nullptr; \
    change(makes && is_below(AT_FDCWD, path), false, [&] {                                     \
      file = REAL(name)(path, mode);                                                           \
      return 0;                                                                                \
    });                                                                                        \
    return file;                                                                               \
  }
DEFINE_FOPEN(fopen)
DEFINE_FOPEN(fopen64)

ssize_t write(int descriptor, const void* bytes, std::size_t size) {
  return partial(descriptor, size, [&](std::size_t n) { return REAL(write)(descriptor, bytes, n); });
}
ssize_t pwrite(int descriptor, const void* bytes, std::size_t size, off_t offset) {
  return partial(descriptor, size, [&](std::size_t n) { return REAL(pwrite)(descriptor, bytes, n, offset); });
}
ssize_t pwrite64(int descriptor, const void* bytes, std::size_t size, off64_t offset) {
  return partial(descriptor, size, [&](std::size_t n) { return REAL(pwrite64)(descriptor, bytes, n, offset); });
}
ssize_t writev(int descriptor, const iovec* parts, int count) {
  return partial(descriptor, static_cast<std::size_t>(count),
                 [&](std::size_t n) { return REAL(writev)(descriptor, parts, static_cast<int>(n)); });
}

int ftruncate(int descriptor, off_t size) noexcept {
  return change(is_below(descriptor), false, [&] { return REAL(ftruncate)(descriptor, size); });
}
int ftruncate64(int descriptor, off64_t size) noexcept {
  return change(is_below(descriptor), false, [&] { return REAL(ftruncate64)(descriptor, size); });
}
int mkdir(const char* path, mode_t mode) noexcept {
  return change(is_below(AT_FDCWD, path), false, [&] { return REAL(mkdir)(path, mode); });
}
int mkdirat(int at, const char* path, mode_t mode) noexcept {
  return change(is_below(at, path), false, [&] { return REAL(mkdirat)(at, path, mode); });
}
int rmdir(const char* path) noexcept {
  return change(is_below(AT_FDCWD, path), true, [&] { return REAL(rmdir)(path); });
}
int unlink(const char* path) noexcept {
  return change(is_below(AT_FDCWD, path), true, [&] { return REAL(unlink)(path); });
}
int unlinkat(int at, const char* path, int flags) noexcept {
  return change(is_below(at, path), true, [&] { return REAL(unlinkat)(at, path, flags); });
}
int rename(const char* from, const char* to) noexcept {
  return change(is_below(AT_FDCWD, to), false, [&] { return REAL(rename)(from, to); });
}
int renameat(int at, const char* from, int to_at, const char* to) noexcept {
  return change(is_below(to_at, to), false, [&] { return REAL(renameat)(at, from, to_at, to); });
}
int renameat2(int at, const char* from, int to_at, const char* to, unsigned flags) noexcept {
  return change(is_below(to_at, to), false, [&] { return REAL(renameat2)(at, from, to_at, to, flags); });
}

/// From now on: the `at`-th change below `path` (real, absolute) is struck. Counting begins anew.
void nanochat_x_arm(const char* path, long at, int how) {
  folder() = path;
  seen = 0;
  strike_at = at;
  kind = how;
}

/// Changes so far.
long nanochat_x_changes() { return seen; }

}  // extern "C"
