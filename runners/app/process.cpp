#include "process.h"

#include <algorithm>
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
#include <io.h>
#else
#include <time.h>
#include <unistd.h>
#endif

#include "nanochat_x/backend.h"
#include "nanochat_x/error.h"

namespace nanochat_x::app {
namespace {

const auto kCodeBegan = std::chrono::steady_clock::now();  // NOLINT(cert-err58-cpp): does not throw

// A signal handler can reach nothing else
std::atomic<bool> interrupt_flag = false;
static_assert(std::atomic<bool>::is_always_lock_free);

extern "C" void set_interrupt_flag(int) {
  interrupt_flag = true;
#ifdef _WIN32
  std::signal(SIGINT, set_interrupt_flag);  // there, a handler serves once
#endif
}

extern "C" void exit_interrupted(int) {
#ifdef _WIN32
  _write(1, "\n", 1);
#else
  [[maybe_unused]] const auto written = write(STDOUT_FILENO, "\n", 1);
#endif
  std::_Exit(kExitInterrupted);
}

// Not where Ctrl-C is ignored on purpose, as a shell does for what runs in the background.
void on_interrupt(void (*handler)(int)) {
  const auto before = std::signal(SIGINT, handler);
  if (before == SIG_IGN) std::signal(SIGINT, SIG_IGN);
}

}  // namespace

std::string program_name() { return "nanochat-" + backend_name(); }

void write_out(std::string_view text) {
  const bool written = std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0;
  if (!written) throw Error(std::string("cannot write to standard output: ") + std::strerror(errno));
}

#ifdef _WIN32

bool stdout_is_terminal() { return _isatty(1) != 0; }
bool stdin_is_terminal() { return _isatty(0) != 0; }
void end_quietly_on_closed_pipe() {}

#else

bool stdout_is_terminal() { return isatty(STDOUT_FILENO) != 0; }
bool stdin_is_terminal() { return isatty(STDIN_FILENO) != 0; }
void end_quietly_on_closed_pipe() { std::signal(SIGPIPE, SIG_DFL); }

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

CatchInterrupt::CatchInterrupt() {
  interrupt_flag = false;
  on_interrupt(set_interrupt_flag);
}
CatchInterrupt::~CatchInterrupt() { on_interrupt(SIG_DFL); }
const std::atomic<bool>* CatchInterrupt::flag() const { return &interrupt_flag; }

ExitOnInterrupt::ExitOnInterrupt() { on_interrupt(exit_interrupted); }
ExitOnInterrupt::~ExitOnInterrupt() { on_interrupt(SIG_DFL); }

}  // namespace nanochat_x::app
