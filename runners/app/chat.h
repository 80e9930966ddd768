#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "nanochat_x/nanochat.h"

namespace nanochat_x::app {

/// Colours may be used on standard output.
bool styled_output();

/// Generates the reply to `conversation`, writing it to standard output as it comes, and a line feed at its end.
Generation write_reply(NanoChat& model, const Conversation& conversation, const GenerateOptions& options);

/// The user's texts of each conversation of a script: a JSON list of lists of strings. Throws Error.
std::vector<std::vector<std::string>> read_script(const std::filesystem::path& file);
/// Answers a script in order. `json`: one line, per conversation a list of turns {"user", "prompt_ids", "new_ids",
/// "sampled_mask", "text"}; else a transcript to read. Ctrl-C
/// ends it. An error or Ctrl-C leaves the finished turns in that line. Returns the exit code; throws Error.
int run_script(NanoChat& model, const std::filesystem::path& file,
               const std::vector<std::vector<std::string>>& conversations, GenerateOptions options, bool json);

/// Talks with the user at standard input until its end.
void run_interactive(NanoChat& model, GenerateOptions options);

}  // namespace nanochat_x::app
