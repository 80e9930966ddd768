#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "nanochat_x/error.h"
#include "nanochat_x/nanochat.h"
#include "nanochat_x/utf8.h"
#include "options.h"
#include "process.h"

namespace nanochat_x::app {
namespace {

using nlohmann::ordered_json;

struct GenerateCommand {
  ModelOptions model;
  GenerateOptions generate;
  std::optional<std::string> prompt, prompt_ids;
  bool json = false;
};

std::vector<TokenId> prompt_of(const GenerateCommand& command, const Tokenizer& tokenizer) {
  if (command.prompt_ids) return parse_integers(*command.prompt_ids, "--prompt-ids", 0);
  std::vector<TokenId> ids = tokenizer.encode(*command.prompt);
  ids.insert(ids.begin(), tokenizer.special().bos);
  return ids;
}

// All that can be told before the model is loaded, which may take long.
void check(const GenerateCommand& command) {
  if (!command.prompt && !command.prompt_ids) throw Error("nothing to continue: give --prompt or --prompt-ids");
  if (command.prompt) check_utf8(*command.prompt, "--prompt");
  if (command.prompt_ids) (void)parse_integers(*command.prompt_ids, "--prompt-ids", 0);
  command.generate.validate();
}

void print_json(const Generation& generation, const Tokenizer& tokenizer, double load_s,
                std::optional<double> first_token_s) {
  ordered_json samples = ordered_json::array();
  for (const Sample& sample : generation.samples) {
    samples.push_back({{"ids", sample.ids},
                       {"mask", sample.mask},
                       {"text", tokenizer.decode(sample.ids)},
                       {"stop", to_string(sample.stop)}});
  }
  const Timing& timing = generation.timing;
  const ordered_json json = {{"samples", samples},
                             {"timing",
                              {{"load_s", load_s},
                               {"prompt_tokens", timing.prompt_tokens},
                               {"prefill_s", timing.prefill_s},
                               {"new_tokens", timing.new_tokens},
                               {"decode_s", timing.decode_s},
                               {"tokens_per_s", timing.tokens_per_s},
                               {"first_token_s", first_token_s ? ordered_json(*first_token_s) : ordered_json()}}}};
  write_out(json.dump() + "\n");
}

void print_samples(const Generation& generation, const Tokenizer& tokenizer) {
  const std::size_t count = generation.samples.size();
  for (std::size_t i = 0; i < count; ++i) {
    write_out("--- sample " + std::to_string(i + 1) + " of " + std::to_string(count) + "\n" +
              tokenizer.decode(generation.samples[i].ids) + "\n");
  }
}

int run_generate(GenerateCommand& command) {
  check(command);
  const auto before = std::chrono::steady_clock::now();
  NanoChat model(command.model.bundle, command.model.backend);
  const std::chrono::duration<double> load = std::chrono::steady_clock::now() - before;
  const Tokenizer& tokenizer = model.tokenizer();
  const bool stream = command.generate.num_samples == 1 && !command.json;

  const CatchInterrupt interrupt;
  command.generate.interrupt = interrupt.flag();
  std::optional<double> first_token_s;
  Utf8Stream characters;
  const Generation generation =
      model.engine().generate(prompt_of(command, tokenizer), command.generate, [&](std::int64_t, TokenId id, bool) {
        if (!first_token_s) first_token_s = seconds_since_process_start();
        if (stream) write_out(characters.push(tokenizer.token_bytes(id)));
      });
  if (command.json) {
    print_json(generation, tokenizer, load.count(), first_token_s);
  } else if (stream) {
    write_out(characters.finish() + "\n");
  } else {
    print_samples(generation, tokenizer);
  }
  return interrupt.raised() ? kExitInterrupted : 0;
}

}  // namespace

void add_generate(CLI::App& app, int& exit_code) {
  const auto command = std::make_shared<GenerateCommand>();
  CLI::App* verb = app.add_subcommand("generate", "Continue a text");
  add_model_options(*verb, command->model);
  CLI::Option* prompt = verb->add_option("-p,--prompt", command->prompt, "Text to continue; <|bos|> is put in front");
  verb->add_option("--prompt-ids", command->prompt_ids, "Token ids to continue, as 1,2,3; taken as they are")
      ->excludes(prompt);
  add_sampling_options(*verb, command->generate);
  add_num_samples(*verb, command->generate);
  verb->add_flag("--raw", command->generate.raw, "Neither stop tokens nor the calculator");
  verb->add_flag("--json", command->json, "One JSON object: samples (ids, mask, text, stop) and timing in seconds");
  verb->callback([command, &exit_code] { exit_code = run_generate(*command); });
}

}  // namespace nanochat_x::app
