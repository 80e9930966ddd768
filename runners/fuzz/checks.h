#pragma once

#include <array>
#include <string_view>

#include "check_manifest.h"
#include "check_safetensors.h"
#include "check_session.h"
#include "check_text.h"

namespace nanochat_x::fuzz {

/// A check by its name, which is also the name of its seeds' folder.
struct Check {
  std::string_view name;
  void (*run)(std::string_view input);
};

inline constexpr std::array<Check, 7> kChecks = {{
    {"manifest", check_manifest},
    {"tokenizer_file", check_tokenizer_file},
    {"session", check_session},
    {"calculator", check_calculator},
    {"safetensors", check_safetensors},
    {"splitter", check_splitter},
    {"utf8", check_utf8},
}};

}  // namespace nanochat_x::fuzz
