#include <memory>
#include <nlohmann/json.hpp>

#include "nanochat_x/bundle.h"
#include "nanochat_x/tokenizer.h"
#include "options.h"
#include "process.h"
#include "windows.h"

namespace nanochat_x::app {
namespace {

using nlohmann::ordered_json;

struct TokenizeCommand {
  std::filesystem::path bundle;
  TextOptions text;
};

// Reads the tokenizer alone: no program of the bundle is loaded, so it may be for another machine.
void run_tokenize(const TokenizeCommand& command) {
  const Texts texts = read_texts(command.text);
  const Bundle bundle = Bundle::open(command.bundle);
  bundle.verify_hash(bundle.manifest().tokenizer);
  const Tokenizer tokenizer = Tokenizer::load(bundle.path_of(bundle.manifest().tokenizer));
  const std::int64_t context = context_of(command.text, bundle.manifest());
  ordered_json windows = ordered_json::array();
  for (const Window& window : windows_of(texts, tokenizer, context)) {
    windows.push_back({{"document", window.document}, {"ids", window.ids}});
  }
  const ordered_json json = {{"context", context}, {"documents", texts.documents.size()}, {"windows", windows}};
  write_out(json.dump() + "\n");
}

}  // namespace

void add_tokenize(CLI::App& app, int& exit_code) {
  const auto command = std::make_shared<TokenizeCommand>();
  CLI::App* verb = app.add_subcommand("tokenize", "Token ids of texts, in the windows of eval, as one line of JSON");
  verb->add_option("BUNDLE", command->bundle, "Folder that `nanochat_x lower` wrote")->required();
  add_text_options(*verb, command->text);
  verb->callback([command, &exit_code] {
    run_tokenize(*command);
    exit_code = 0;
  });
}

}  // namespace nanochat_x::app
