#include "windows.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "json_reader.h"
#include "nanochat_x/error.h"
#include "options.h"
#include "process.h"
#include "text.h"

namespace nanochat_x::app {
namespace {

constexpr const char* kForm = "--docs takes a JSON list of texts, or an object with such a list at \"docs\"";

std::vector<std::string> read_documents(const std::filesystem::path& file) {
  const std::string where = internal::display(file);
  const auto json = internal::parse_json(read_text(file, "JSON file of documents"), where, kForm);
  const bool wrapped = json.is_object() && json.contains("docs");
  const auto& list = wrapped ? json["docs"] : json;
  if (!list.is_array()) throw Error(where + ": is no list of texts; " + kForm);
  std::vector<std::string> documents;
  for (const auto& text : list) {
    if (!text.is_string()) {
      throw Error(where + ": document " + std::to_string(documents.size() + 1) + " is not a text; " + kForm);
    }
    documents.push_back(text.get<std::string>());
  }
  if (documents.empty()) throw Error(where + ": holds no document; " + kForm);
  return documents;
}

}  // namespace

void add_text_options(CLI::App& verb, TextOptions& options) {
  CLI::Option* text = verb.add_option("--text", options.text,
                                      "One text, UTF-8: every token of it is predicted, in consecutive windows of the "
                                      "context, each of which begins with <|bos|>");
  verb.add_option("--docs", options.docs,
                  "JSON, a list of texts or {\"docs\": [...]}: each with <|bos|> in front, cut to one window")
      ->excludes(text);
  add_context(verb, options.context);
}

Texts read_texts(const TextOptions& options) {
  if (options.text.empty() && options.docs.empty()) throw Error("there is no text: give --text FILE or --docs FILE");
  if (!options.docs.empty()) {
    const std::filesystem::path file = options.docs;
    return {.documents = read_documents(file), .whole = false, .where = internal::display(file)};
  }
  const std::filesystem::path file = options.text;
  Texts texts{.documents = {read_text(file, "text")}, .whole = true, .where = internal::display(file)};
  check_utf8(texts.documents.front(), texts.where);
  return texts;
}

std::int64_t context_of(const TextOptions& options, const Manifest& manifest) {
  if (options.context == 0) return std::min(manifest.sequence_len, manifest.max_seq_len);
  if (options.context > manifest.max_seq_len) {
    throw Error("--context " + std::to_string(options.context) + " is more than the " +
                std::to_string(manifest.max_seq_len) +
                " tokens that the bundle takes; choose less, or lower again with a larger --max-seq-len");
  }
  return options.context;
}

std::vector<Window> windows_of(const Texts& texts, const Tokenizer& tokenizer, std::int64_t context) {
  std::vector<Window> windows;
  for (std::size_t d = 0; d < texts.documents.size(); ++d) {
    const std::vector<TokenId> ids = tokenizer.encode(texts.documents[d]);
    const std::int64_t end = texts.whole ? std::ssize(ids) : std::min(std::ssize(ids), context);
    for (std::int64_t begin = 0; begin < end; begin += context) {
      Window window{.document = d, .ids = {tokenizer.special().bos}};
      window.ids.insert(window.ids.end(), ids.begin() + begin, ids.begin() + std::min(begin + context, end));
      windows.push_back(std::move(window));
    }
  }
  if (windows.empty()) throw Error(texts.where + ": is empty, there is no token to predict");
  return windows;
}

}  // namespace nanochat_x::app
