#include "chat.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string_view>

#include "nanochat_x/error.h"
#include "options.h"
#include "process.h"
#include "reply_printer.h"

namespace nanochat_x::app {
namespace {

struct ChatCommand {
  ModelOptions model;
  GenerateOptions generate;
  std::optional<std::string> prompt;
  std::optional<std::filesystem::path> script;
  bool json = false;
};

int run_prompt(NanoChat& model, const std::string& prompt, GenerateOptions options) {
  Conversation conversation(model.tokenizer());
  conversation.add_user(prompt);
  const CatchInterrupt interrupt;
  options.interrupt = interrupt.flag();
  const Generation generation = write_reply(model, conversation, options);
  if (generation.samples.front().stop == StopReason::context) {
    std::fprintf(stderr, "%s: note: the reply was cut, the model's context of %s tokens is full\n",
                 program_name().c_str(), std::to_string(model.manifest().max_seq_len).c_str());
  }
  return interrupt.raised() ? kExitInterrupted : 0;
}

int run_chat(const ChatCommand& command) {
  // all that can be told before the model is loaded, which may take long
  command.generate.validate();
  if (command.prompt) {
    check_utf8(*command.prompt, "--prompt");
    if (command.prompt->empty()) throw Error("--prompt is empty; leave it out to chat interactively");
  }
  std::vector<std::vector<std::string>> script;
  if (command.script) script = read_script(*command.script);

  NanoChat model(command.model.bundle, command.model.backend);
  if (command.prompt) return run_prompt(model, *command.prompt, command.generate);
  if (command.script) return run_script(model, *command.script, script, command.generate, command.json);
  run_interactive(model, command.generate);
  return 0;
}

}  // namespace

namespace {

// A reply that an error breaks off leaves the terminal as it was.
class RestoreStyle {
 public:
  explicit RestoreStyle(const ReplyPrinter& printer) : printer_(&printer) {}
  ~RestoreStyle() {
    try {
      if (!printer_->plain().empty()) write_out(printer_->plain());
    } catch (const Error&) {  // standard output is gone, and with it what was dimmed
    }
  }
  RestoreStyle(const RestoreStyle&) = delete;
  RestoreStyle& operator=(const RestoreStyle&) = delete;

 private:
  const ReplyPrinter* printer_;
};

}  // namespace

bool styled_output() {
  const char* no_color = std::getenv("NO_COLOR");  // https://no-color.org
  const char* term = std::getenv("TERM");
  return stdout_is_terminal() && (!no_color || !*no_color) && term && std::string_view(term) != "dumb";
}

Generation write_reply(NanoChat& model, const Conversation& conversation, const GenerateOptions& options) {
  ReplyPrinter printer(model.tokenizer(), styled_output());
  const RestoreStyle at_the_end(printer);
  Generation generation = model.engine().generate(
      conversation.ids(), options,
      [&printer](std::int64_t, TokenId id, bool sampled) { write_out(printer.push(id, sampled)); });
  write_out(printer.finish() + "\n");
  return generation;
}

void add_chat(CLI::App& app, int& exit_code) {
  const auto command = std::make_shared<ChatCommand>();
  CLI::App* verb = app.add_subcommand("chat", "Chat with the model");
  add_model_options(*verb, command->model);
  CLI::Option* prompt = verb->add_option("-p,--prompt", command->prompt, "Reply to this text and end");
  CLI::Option* script = verb->add_option("--script", command->script,
                                         "Answer FILE: a JSON list of conversations, each a list of the user's texts")
                            ->excludes(prompt);
  verb->add_flag("--json", command->json,
                 "With --script: one JSON list of conversations, each a list of turns with ids, mask and text")
      ->needs(script);
  add_sampling_options(*verb, command->generate);
  verb->callback([command, &exit_code] { exit_code = run_chat(*command); });
}

}  // namespace nanochat_x::app
