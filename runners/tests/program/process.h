#pragma once

#include <sys/types.h>

#include <chrono>
#include <string>
#include <vector>

// Runs a program as a person or a script would (POSIX).

namespace nanochat_x::test {

/// How a program ended: `exit_code`, or `signal` (else 0) that killed it.
struct Ended {
  int exit_code = -1, signal = 0;
};

/// A running program with pipes, or a terminal, at its standard streams. Killed at the end of the scope.
class Process {
 public:
  enum class Streams { pipes, terminal };
  explicit Process(const std::vector<std::string>& arguments, Streams streams = Streams::pipes);
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  void write(const std::string& text);
  void close_input();
  void close_output();
  void interrupt();  ///< SIGINT
  void send(int signal);
  /// Reads standard output until it contains `text` (behind what was waited for before). Throws after ten seconds.
  void wait_for(const std::string& text);
  /// Reads both streams to their end. Throws after ten seconds.
  Ended finish();

  std::string out, err;
  std::vector<std::string> reads;  ///< standard output as it came

 private:
  bool read_some(std::chrono::steady_clock::time_point deadline);
  pid_t pid_ = -1;
  int in_ = -1, out_ = -1, err_ = -1;
  std::size_t waited_ = 0;
};

/// One run to its end.
struct Run {
  std::string out, err;
  int exit_code;
};
Run run(const std::vector<std::string>& arguments, const std::string& input = "");

}  // namespace nanochat_x::test
