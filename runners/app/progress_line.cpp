#include "progress_line.h"

#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "process.h"

namespace nanochat_x::app {
namespace {

constexpr std::chrono::milliseconds kBetween{100};

bool can_rewrite() {
  const char* term = std::getenv("TERM");
  return stderr_is_terminal() && term && std::string_view(term) != "dumb";
}

}  // namespace

ProgressLine::ProgressLine() : on_(can_rewrite()) {}

bool ProgressLine::is_due() const { return on_ && std::chrono::steady_clock::now() >= next_; }

void ProgressLine::show(const std::string& text) {
  if (!is_due()) return;
  std::fprintf(stderr, "\r%s\x1b[K", text.c_str());  // to the end of the line: what a longer text left
  std::fflush(stderr);
  shown_ = true;
  next_ = std::chrono::steady_clock::now() + kBetween;
}

void ProgressLine::clear() {
  if (!shown_) return;
  std::fputs("\r\x1b[K", stderr);
  std::fflush(stderr);
  shown_ = false;
}

}  // namespace nanochat_x::app
