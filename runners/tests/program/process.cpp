#include "process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>

namespace nanochat_x::test {
namespace {

constexpr auto kPatience = std::chrono::seconds(10);

void check(bool worked, const char* what) {
  if (!worked) throw std::runtime_error(std::string("cannot ") + what);
}

struct Ends {
  int read = -1, write = -1;
};

Ends make_pipe() {
  int ends[2];
  check(pipe2(ends, O_CLOEXEC) == 0, "make a pipe");
  return {ends[0], ends[1]};
}

void close_end(int& fd) {
  if (fd >= 0) close(fd);
  fd = -1;
}

// What is there; at the end the stream is closed.
std::string read_from(int& fd) {
  char buffer[4096];
  const ssize_t size = read(fd, buffer, sizeof buffer);
  if (size <= 0) close_end(fd);
  return {buffer, static_cast<std::size_t>(size > 0 ? size : 0)};
}

// A new terminal whose echo is off, so that what is read is the program's own.
int open_terminal(std::string& name) {
  const int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
  check(master >= 0 && grantpt(master) == 0 && unlockpt(master) == 0, "open a terminal");
  name = ptsname(master);
  termios settings{};
  tcgetattr(master, &settings);
  settings.c_lflag &= ~static_cast<tcflag_t>(ECHO);
  settings.c_oflag &= ~static_cast<tcflag_t>(OPOST);
  tcsetattr(master, TCSANOW, &settings);
  return master;
}

}  // namespace

Process::Process(const std::vector<std::string>& arguments, Streams streams) {
  std::vector<char*> argv;
  for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  const bool terminal = streams == Streams::terminal;
  std::string name;
  const int master = terminal ? open_terminal(name) : -1;
  Ends in_pipe = terminal ? Ends{} : make_pipe(), out_pipe = terminal ? Ends{} : make_pipe();
  Ends err_pipe = make_pipe();
  signal(SIGPIPE, SIG_IGN);  // of the tests themselves, when a program ends before it has read all
  pid_ = fork();
  check(pid_ >= 0, "fork");
  if (pid_ == 0) {
    // Where the tests run in the background (nohup, `make test &`) some are ignored, and that is inherited.
    for (const int number : {SIGPIPE, SIGINT, SIGHUP, SIGTERM}) signal(number, SIG_DFL);
    if (terminal) {
      setsid();  // the terminal opened next is this process's own: Ctrl-C there reaches it
      setenv("TERM", "xterm", 1);
      in_pipe.read = out_pipe.write = open(name.c_str(), O_RDWR);
    }
    dup2(in_pipe.read, 0);
    dup2(out_pipe.write, 1);
    dup2(err_pipe.write, 2);
    execv(argv[0], argv.data());
    _exit(127);
  }
  close_end(in_pipe.read);
  close_end(out_pipe.write);
  close_end(err_pipe.write);
  in_ = terminal ? master : in_pipe.write;
  out_ = terminal ? dup(master) : out_pipe.read;
  err_ = err_pipe.read;
}

Process::~Process() {
  close_end(in_);
  close_end(out_);
  close_end(err_);
  if (pid_ > 0) {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
}

void Process::write(const std::string& text) {
  // the program may end without reading: what it says then is the test's to judge
  [[maybe_unused]] const auto written = ::write(in_, text.data(), text.size());
}

void Process::close_input() { close_end(in_); }
void Process::close_output() { close_end(out_); }
void Process::interrupt() { send(SIGINT); }
void Process::send(int signal) { kill(pid_, signal); }

// Reads what is there from both streams. False at the end of both.
bool Process::read_some(std::chrono::steady_clock::time_point deadline) {
  pollfd streams[] = {{out_, POLLIN, 0}, {err_, POLLIN, 0}};
  if (out_ < 0 && err_ < 0) return false;
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
  if (left.count() <= 0 || poll(streams, 2, static_cast<int>(left.count())) == 0) {
    throw std::runtime_error("the program said nothing more for ten seconds; so far:\n" + out + "\n" + err);
  }
  if (streams[0].revents != 0) {
    const std::string piece = read_from(out_);
    out += piece;
    if (!piece.empty()) reads.push_back(piece);
  }
  if (streams[1].revents != 0) err += read_from(err_);
  return true;
}

void Process::wait_for(const std::string& text) {
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  for (std::size_t at = out.find(text, waited_);; at = out.find(text, waited_)) {
    if (at != std::string::npos) {
      waited_ = at + text.size();
      return;
    }
    if (!read_some(deadline))
      throw std::runtime_error("the program ended before it said '" + text + "':\n" + out + err);
  }
}

Ended Process::finish() {
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (read_some(deadline)) {
  }
  int status = 0;
  check(waitpid(pid_, &status, 0) == pid_, "wait for the program");
  pid_ = -1;
  if (WIFSIGNALED(status)) return {.signal = WTERMSIG(status)};
  return {.exit_code = WEXITSTATUS(status)};
}

Run run(const std::vector<std::string>& arguments, const std::string& input) {
  Process process(arguments);
  process.write(input);
  process.close_input();
  const Ended ended = process.finish();
  return {.out = process.out, .err = process.err, .exit_code = ended.signal ? -ended.signal : ended.exit_code};
}

}  // namespace nanochat_x::test
