#include "process.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>

#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#else
#include <fcntl.h>
#include <time.h>
#include <unistd.h>
#endif

#ifdef __GLIBC__  // which the headers above define
#include <malloc.h>
#endif

#include "nanochat_x/backend.h"
#include "nanochat_x/error.h"

namespace nanochat_x::app {
namespace {

const auto kCodeBegan = std::chrono::steady_clock::now();  // NOLINT(cert-err58-cpp): does not throw

// A signal handler can reach nothing else
std::atomic<bool> interrupt_flag = false;
std::atomic<int> caught_signal = SIGINT;
static_assert(std::atomic<bool>::is_always_lock_free && std::atomic<int>::is_always_lock_free);
// "nanochat-aoti: ", kept where a handler may read it
std::array<char, 64> line_start{};

#ifdef SIGHUP
constexpr std::array kRequestsToEnd = {SIGTERM, SIGHUP};
#else
constexpr std::array kRequestsToEnd = {SIGTERM};
#endif

extern "C" void set_interrupt_flag(int number) {
  caught_signal = number;
  interrupt_flag = true;
#ifdef _WIN32
  std::signal(number, set_interrupt_flag);  // there, a handler serves once
#endif
}

// Calls nothing that a handler may not.
void say(const char* text) {
#ifdef _WIN32
  _write(2, text, static_cast<unsigned>(std::strlen(text)));
#else
  [[maybe_unused]] const auto written = write(STDERR_FILENO, text, std::strlen(text));
#endif
}

int tell_signal(int number) {
  say(line_start.data());
  say(number == SIGINT ? "interrupted\n" : number == SIGTERM ? "ended by SIGTERM\n" : "ended by SIGHUP\n");
  return kSignalBase + number;
}

extern "C" void end_at_once(int number) { std::_Exit(tell_signal(number)); }

extern "C" void exit_interrupted(int) {
#ifdef _WIN32
  _write(1, "\n", 1);
#else
  [[maybe_unused]] const auto written = write(STDOUT_FILENO, "\n", 1);
#endif
  std::_Exit(kExitInterrupted);
}

// Not where the signal is ignored on purpose, as a shell does for what runs in the background, and nohup.
void handle(int number, void (*handler)(int)) {
  const auto before = std::signal(number, handler);
  if (before == SIG_IGN) std::signal(number, SIG_IGN);
}

}  // namespace

std::string program_name() { return "nanochat-" + backend_name(); }

void write_out(std::string_view text) {
  const bool written = std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0;
  if (!written) throw Error(std::string("cannot write to standard output: ") + std::strerror(errno));
}

std::string read_text(const std::filesystem::path& file, const std::string& what) {
  if (std::filesystem::is_directory(file)) throw Error("'" + file.string() + "' is a folder, not a " + what);
  std::ifstream stream(file, std::ios::binary);
  std::string text;
  if (stream) text.assign(std::istreambuf_iterator<char>(stream), {});
  if (!stream) throw Error("cannot read the " + what + " '" + file.string() + "': " + std::strerror(errno));
  return text;
}

void keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the most that glibc takes
  mallopt(M_TRIM_THRESHOLD, 512 << 20);
#endif
}

#ifdef _WIN32

void use_binary_output() { _setmode(1, _O_BINARY); }
bool stdout_is_terminal() { return _isatty(1) != 0; }
bool stdin_is_terminal() { return _isatty(0) != 0; }
bool stderr_is_terminal() { return _isatty(2) != 0; }
void end_quietly_on_closed_pipe() {}
void reserve_standard_streams() {}

#else

void use_binary_output() {}
bool stdout_is_terminal() { return isatty(STDOUT_FILENO) != 0; }
bool stdin_is_terminal() { return isatty(STDIN_FILENO) != 0; }
bool stderr_is_terminal() { return isatty(STDERR_FILENO) != 0; }
void end_quietly_on_closed_pipe() { std::signal(SIGPIPE, SIG_DFL); }

void reserve_standard_streams() {
  for (int number = 0; number <= 2; ++number) {
    if (fcntl(number, F_GETFD) < 0) (void)open("/dev/null", O_RDONLY);  // gets the lowest number that is free
  }
}

#endif

double seconds_since_process_start() {
  const std::chrono::duration<double> own = std::chrono::steady_clock::now() - kCodeBegan;
#ifdef __linux__
  // proc(5): after the name in parentheses, field 3 and on; field 22 is the start in clock ticks since boot
  std::ifstream file("/proc/self/stat");
  std::string stat{std::istreambuf_iterator<char>(file), {}};
  std::istringstream fields(stat.substr(std::min(stat.size(), stat.rfind(')') + 1)));
  std::string skipped;
  for (int field = 3; field < 22; ++field) fields >> skipped;
  double start_ticks = 0;
  timespec now{};
  if (fields >> start_ticks && clock_gettime(CLOCK_BOOTTIME, &now) == 0) {
    const double age = static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9 -
                       start_ticks / static_cast<double>(sysconf(_SC_CLK_TCK));
    // sandboxes may count these two from different moments
    if (age >= own.count() && age < own.count() + 60) return age;
  }
#endif
  return own.count();
}

void end_on_signals() {
  const std::string start = program_name() + ": ";
  std::copy_n(start.begin(), std::min(start.size(), line_start.size() - 1), line_start.begin());
  handle(SIGINT, end_at_once);
  for (const int number : kRequestsToEnd) handle(number, end_at_once);
}

CatchInterrupt::CatchInterrupt(bool all) : all_(all) {
  interrupt_flag = false;
  handle(SIGINT, set_interrupt_flag);
  if (!all_) return;
  for (const int number : kRequestsToEnd) handle(number, set_interrupt_flag);
}
CatchInterrupt::~CatchInterrupt() {
  handle(SIGINT, end_at_once);
  if (!all_) return;
  for (const int number : kRequestsToEnd) handle(number, end_at_once);
}
const std::atomic<bool>* CatchInterrupt::flag() const { return &interrupt_flag; }

int tell_caught_signal() { return tell_signal(caught_signal); }

ExitOnInterrupt::ExitOnInterrupt() { handle(SIGINT, exit_interrupted); }
ExitOnInterrupt::~ExitOnInterrupt() { handle(SIGINT, end_at_once); }

}  // namespace nanochat_x::app
