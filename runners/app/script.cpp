#include <nlohmann/json.hpp>

#include "chat.h"
#include "nanochat_x/error.h"
#include "process.h"

namespace nanochat_x::app {
namespace {

using nlohmann::ordered_json;

// "conversation 2, turn 1", counted from 1
std::string place(std::size_t conversation, std::size_t turn) {
  return "conversation " + std::to_string(conversation + 1) + ", turn " + std::to_string(turn + 1);
}

ordered_json turn_json(const std::string& user, const std::vector<TokenId>& prompt, const Sample& sample,
                       const Tokenizer& tokenizer) {
  return {{"user", user},
          {"prompt_ids", prompt},
          {"new_ids", sample.ids},
          {"sampled_mask", sample.mask},
          {"text", tokenizer.decode(sample.ids)}};
}

}  // namespace

std::vector<std::vector<std::string>> read_script(const std::filesystem::path& file) {
  const std::string where = "script '" + file.string() + "'";
  ordered_json json;
  try {
    json = ordered_json::parse(read_text(file, "script"));
  } catch (const ordered_json::exception& error) {
    throw Error(where + " is not JSON: " + error.what());
  }
  const std::string wanted = "; a script is a list of conversations, each a list of the user's texts";
  if (!json.is_array()) throw Error(where + " is not a list" + wanted);
  std::vector<std::vector<std::string>> conversations;
  for (const auto& conversation : json) {
    const std::size_t c = conversations.size();
    if (!conversation.is_array()) {
      throw Error(where + ": conversation " + std::to_string(c + 1) + " is not a list" + wanted);
    }
    std::vector<std::string>& texts = conversations.emplace_back();
    for (const auto& text : conversation) {
      if (!text.is_string()) throw Error(where + ": " + place(c, texts.size()) + " is not a string" + wanted);
      texts.push_back(text.get<std::string>());
    }
  }
  return conversations;
}

int run_script(NanoChat& model, const std::filesystem::path& file,
               const std::vector<std::vector<std::string>>& conversations, GenerateOptions options, bool json) {
  ordered_json result = ordered_json::array();
  // Also when an error or Ctrl-C ends the script: what was computed until then took its time.
  const auto write_result = [&result, json] {
    if (json) write_out(result.dump() + "\n");
  };
  const CatchInterrupt interrupt;
  options.interrupt = interrupt.flag();
  for (std::size_t c = 0; c < conversations.size(); ++c) {
    Conversation conversation(model.tokenizer());
    ordered_json& turns = result.emplace_back(ordered_json::array());
    if (!json && c > 0) write_out("---\n\n");
    for (std::size_t t = 0; t < conversations[c].size(); ++t) {
      const std::string& user = conversations[c][t];
      Sample sample;
      try {
        conversation.add_user(user);
        if (!json) write_out("User: " + user + "\n\nAssistant: ");
        Generation generation =
            json ? model.engine().generate(conversation.ids(), options) : write_reply(model, conversation, options);
        sample = std::move(generation.samples.front());
      } catch (const Error& error) {
        write_result();
        throw Error("script '" + file.string() + "', " + place(c, t) + ": " + error.what());
      }
      const bool finished = sample.stop != StopReason::interrupt;
      if (json && finished) turns.push_back(turn_json(user, conversation.ids(), sample, model.tokenizer()));
      if (!finished || interrupt.raised()) {
        write_result();
        return tell_caught_signal();
      }
      conversation.add_reply(sample.ids);
      if (!json) write_out("\n");
    }
  }
  write_result();
  return 0;
}

}  // namespace nanochat_x::app
