#include "own_program.h"

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "nanochat_x/error.h"

#ifndef _WIN32
#include <fcntl.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#endif
#ifdef __APPLE__
#include <mach-o/dyld.h>
#endif

#ifndef _WIN32
extern char** environ;  // NOLINT(readability-redundant-declaration): POSIX wants it declared by the program
#endif

namespace nanochat_x::app {

#ifdef _WIN32

std::optional<Finished> run_self(const std::vector<std::string>&) { return std::nullopt; }
std::optional<std::uint64_t> peak_memory_bytes() { return std::nullopt; }

#else

namespace {

[[noreturn]] void cannot_start(int error) {
  throw Error(std::string("cannot start this program once more: ") + std::strerror(error));
}

std::string own_path() {
#ifdef __APPLE__
  std::array<char, 4096> path{};
  auto size = static_cast<std::uint32_t>(path.size());
  if (_NSGetExecutablePath(path.data(), &size) != 0) cannot_start(ENAMETOOLONG);
  return path.data();
#else
  std::error_code error;
  const std::filesystem::path path = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) cannot_start(error.value());
  return path.string();
#endif
}

class Pipe {
 public:
  Pipe() {
    if (pipe(ends_.data()) != 0) cannot_start(errno);
    for (const int end : ends_) (void)fcntl(end, F_SETFD, FD_CLOEXEC);
  }
  ~Pipe() {
    close_end(0);
    close_end(1);
  }
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;

  int writing_end() const { return ends_[1]; }
  /// All that is written, until nobody can write any more.
  std::string read_all() {
    close_end(1);
    std::string text;
    std::array<char, 4096> block{};
    while (true) {
      const ssize_t size = read(ends_[0], block.data(), block.size());
      if (size < 0 && errno == EINTR) continue;
      if (size <= 0) return text;
      text.append(block.data(), static_cast<std::size_t>(size));
    }
  }

 private:
  void close_end(std::size_t i) {
    if (ends_[i] >= 0) close(ends_[i]);
    ends_[i] = -1;
  }
  std::array<int, 2> ends_{-1, -1};
};

class FileActions {
 public:
  FileActions() { posix_spawn_file_actions_init(&actions_); }
  ~FileActions() { posix_spawn_file_actions_destroy(&actions_); }
  FileActions(const FileActions&) = delete;
  FileActions& operator=(const FileActions&) = delete;
  posix_spawn_file_actions_t* get() { return &actions_; }

 private:
  posix_spawn_file_actions_t actions_{};
};

int exit_code_of(pid_t process) {
  int status = 0;
  while (waitpid(process, &status, 0) < 0) {
    if (errno != EINTR) return -1;
  }
  return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

}  // namespace

std::optional<Finished> run_self(const std::vector<std::string>& arguments) {
  std::string path = own_path();
  std::vector<std::string> copies = arguments;
  std::vector<char*> argv = {path.data()};
  for (std::string& argument : copies) argv.push_back(argument.data());
  argv.push_back(nullptr);

  Pipe out, err;
  FileActions actions;
  posix_spawn_file_actions_addopen(actions.get(), STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(actions.get(), out.writing_end(), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(actions.get(), err.writing_end(), STDERR_FILENO);
  pid_t process = 0;
  const int error = posix_spawn(&process, path.c_str(), actions.get(), nullptr, argv.data(), environ);
  if (error != 0) cannot_start(error);
  Finished finished;
  finished.out = out.read_all();
  finished.err = err.read_all();  // a line or two, which a pipe holds until now
  finished.exit_code = exit_code_of(process);
  return finished;
}

std::optional<std::uint64_t> peak_memory_bytes() {
#ifdef __linux__
  // proc(5). getrusage would count what the program that started this one had had.
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stoull(line.substr(6)) * 1024;
  }
  return std::nullopt;
#else
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return std::nullopt;
#ifdef __APPLE__
  return static_cast<std::uint64_t>(usage.ru_maxrss);  // bytes there, kilobytes elsewhere
#else
  return static_cast<std::uint64_t>(usage.ru_maxrss) * 1024;
#endif
#endif
}

#endif

}  // namespace nanochat_x::app
