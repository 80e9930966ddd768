#include <algorithm>
#include <iostream>
#include <optional>
#include <string>

#include "chat.h"
#include "nanochat_x/utf8.h"
#include "options.h"
#include "process.h"

namespace nanochat_x::app {
namespace {

constexpr const char* kHelp =
    "quit, exit or Ctrl-D   end the program\n"
    "clear                  begin a new conversation\n"
    "/help                  this list\n"
    "Ctrl-C                 end a reply; at the prompt, end the program\n";

std::string stripped(std::string_view line) {
  constexpr std::string_view kSpace = " \t\r\n\v\f";
  const std::size_t begin = std::min(line.find_first_not_of(kSpace), line.size());
  const std::size_t end = line.find_last_not_of(kSpace) + 1;  // npos + 1 is 0
  return std::string(line.substr(begin, std::max(begin, end) - begin));
}

std::string lower(std::string text) {
  std::ranges::transform(text, text.begin(),
                         [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
  return text;
}

// A line from standard input without the space around it; nothing at its end.
std::optional<std::string> ask() {
  const ExitOnInterrupt while_waiting;
  write_out("\nUser: ");
  std::string line;
  if (!std::getline(std::cin, line)) return std::nullopt;
  return stripped(line);
}

// A message that cannot be encoded: told and forgotten when someone types, an error when a file is piped in.
bool usable(const std::string& line) {
  if (is_valid_utf8(line)) return true;
  if (!stdin_is_terminal()) check_utf8(line, "a line of standard input");
  write_out("That message is not valid UTF-8 and was left out.\n");
  return false;
}

void tell_full(const Manifest& manifest) {
  write_out("[The context of " + std::to_string(manifest.max_seq_len) +
            " tokens is full: type 'clear' to begin a new conversation.]\n");
}

void tell_too_long(std::ptrdiff_t tokens, const Manifest& manifest) {
  write_out("[That message takes " + std::to_string(tokens) + " tokens, more than the whole context of " +
            std::to_string(manifest.max_seq_len) +
            ": shorten it, or lower the model again with a larger --max-seq-len.]\n");
}

// One turn. A message that does not fit, or whose reply was ended before its first token, leaves the conversation as it
// was.
void turn(NanoChat& model, Conversation& conversation, const std::string& line, GenerateOptions& options) {
  Conversation longer = conversation;
  longer.add_user(line);
  if (std::ssize(longer.ids()) > model.manifest().max_seq_len) {
    Conversation alone(model.tokenizer());
    alone.add_user(line);
    const std::ptrdiff_t tokens = std::ssize(alone.ids());
    return tokens > model.manifest().max_seq_len ? tell_too_long(tokens, model.manifest())
                                                 : tell_full(model.manifest());
  }
  const CatchInterrupt interrupt;
  options.interrupt = interrupt.flag();
  write_out("\nAssistant: ");
  const Generation generation = write_reply(model, longer, options);
  const Sample& reply = generation.samples.front();
  if (reply.ids.empty()) {
    if (reply.stop == StopReason::interrupt) write_out("[Ended before the reply began: the message was left out.]\n");
    return;
  }
  longer.add_reply(reply.ids);
  conversation = std::move(longer);
  if (reply.stop == StopReason::context) tell_full(model.manifest());
}

}  // namespace

void run_interactive(NanoChat& model, GenerateOptions options) {
  write_out("Chat with a nanochat model (" + std::to_string(model.manifest().n_layer) + " layers, context of " +
            std::to_string(model.manifest().max_seq_len) +
            " tokens).\nType quit or exit to end, clear to begin a new conversation, /help for more.\n");
  Conversation conversation(model.tokenizer());
  while (true) {
    const std::optional<std::string> line = ask();
    if (!line) write_out("\n");
    const std::string command = line ? lower(*line) : "quit";
    if (command == "quit" || command == "exit") {
      write_out("Goodbye!\n");
      return;
    }
    if (command == "clear") {
      conversation.clear();
      write_out("A new conversation begins.\n");
    } else if (command == "/help") {
      write_out(kHelp);
    } else if (!command.empty() && usable(*line)) {
      turn(model, conversation, *line, options);
    }
  }
}

}  // namespace nanochat_x::app
