#pragma once

#include <doctest/doctest.h>
#include <hwy/targets.h>

#include <string>

#include "kernels.h"

namespace nanochat_x::test {

/// Calls `test` once with each instruction set that the kernels were compiled for and this machine has, the plain one
/// included, and gives the choice back.
template <typename Test>
void with_each_instruction_set(Test&& test) {
  struct Restore {
    ~Restore() {
      hwy::SetSupportedTargetsForTest(0);
      hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    }
  } restore;
  std::string seen;
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    const std::string name = kernels::instruction_set();
    if (seen.find("<" + name + ">") != std::string::npos) continue;  // not compiled for: a lesser one was taken, again
    seen += "<" + name + ">";
    CAPTURE(name);
    test();
  }
}

}  // namespace nanochat_x::test
