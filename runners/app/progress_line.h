#pragma once

#include <chrono>
#include <string>

namespace nanochat_x::app {

/// One line on standard error that is rewritten while work goes on, and taken away at its end. Nothing at all where
/// that is no terminal, or one that cannot (TERM=dumb).
class ProgressLine {
 public:
  ProgressLine();
  ~ProgressLine() { clear(); }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  /// Whether a text given now would be shown: not if the last one is too young.
  bool is_due() const;
  void show(const std::string& text);
  void clear();

 private:
  bool on_, shown_ = false;
  std::chrono::steady_clock::time_point next_{};
};

}  // namespace nanochat_x::app
