#pragma once

#include <atomic>
#include <filesystem>
#include <string>
#include <string_view>

// What the program asks of the operating system: its streams, Ctrl-C, its own age.

namespace nanochat_x::app {

/// "nanochat-aoti"
std::string program_name();

/// Writes to standard output and flushes. Throws Error when it cannot (a full disk); a reader that has gone away ends
/// the program quietly.
void write_out(std::string_view text);

/// From now on standard output takes bytes as they are, line feeds too (on Windows it would change them).
void use_binary_output();

/// A whole file, byte for byte. Throws Error, which calls it a `what`.
std::string read_text(const std::filesystem::path& file, const std::string& what);

/// A standard stream is a terminal.
bool stdout_is_terminal();
bool stdin_is_terminal();
bool stderr_is_terminal();

/// Puts something that cannot be written to in the place of a standard stream that is closed: the next file to be
/// opened would get its number.
void reserve_standard_streams();

/// Freed memory stays with the process for the next call. A prefill asks for the same megabytes in every layer; given
/// back each time, their pages would be zeroed anew at each (measured: a tenth of a prefill of 512 tokens at d12).
void keep_freed_memory();

/// Makes a pipe whose reader has gone away end the program as other tools end, whatever the parent had set.
void end_quietly_on_closed_pipe();

/// Seconds since the operating system started this process, loading of libraries included (to some 10 ms on Linux;
/// elsewhere since this program's own code began).
double seconds_since_process_start();

/// From now on Ctrl-C, and a request to end (SIGTERM, SIGHUP), say one line and end the program at once, with exit code
/// 128 + the signal's number. What must be cleaned up first is done under a `CatchInterrupt`.
void end_on_signals();

/// While it lives, Ctrl-C sets `flag()` instead of ending the program.
class CatchInterrupt {
 public:
  /// `all`: so do the requests to end.
  explicit CatchInterrupt(bool all = false);
  ~CatchInterrupt();
  CatchInterrupt(const CatchInterrupt&) = delete;
  CatchInterrupt& operator=(const CatchInterrupt&) = delete;
  const std::atomic<bool>* flag() const;
  bool raised() const { return flag()->load(); }

 private:
  bool all_;
};

/// Says the line of the signal that a `CatchInterrupt` caught last; returns its exit code.
int tell_caught_signal();

/// While it lives, Ctrl-C ends the program at once, with a line feed and exit code 130. For waiting at a prompt: a read
/// that a signal is meant to break may start just after the signal and never end.
class ExitOnInterrupt {
 public:
  ExitOnInterrupt();
  ~ExitOnInterrupt();
  ExitOnInterrupt(const ExitOnInterrupt&) = delete;
  ExitOnInterrupt& operator=(const ExitOnInterrupt&) = delete;
};

constexpr int kSignalBase = 128;       // as shells have it
constexpr int kExitInterrupted = 130;  // kSignalBase + SIGINT

}  // namespace nanochat_x::app
