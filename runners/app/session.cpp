#include <bit>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "nanochat_x/error.h"
#include "nanochat_x/nanochat.h"
#include "options.h"
#include "process.h"

// The verb `session`: another program's way to drive a bundle step by step. docs/session.md is the protocol.

namespace nanochat_x::app {
namespace {

using Json = nlohmann::json;

static_assert(std::endian::native == std::endian::little, "logits are sent as little-endian float32");

/// What a request is answered with: a line of JSON, and the logits that follow it as raw bytes.
struct Answer {
  Json line = Json::object();
  std::optional<Logits> logits;
};

/// Token ids [rows, length] as they stand in a request.
struct Ids {
  std::vector<TokenId> values;
  std::int64_t rows = 0, length = 0;
};

Ids read_ids(const Json& request) {
  const auto lists = request.at("ids").get<std::vector<std::vector<TokenId>>>();
  Ids ids;
  ids.rows = std::ssize(lists);
  ids.length = lists.empty() ? 0 : std::ssize(lists.front());
  for (const auto& row : lists) {
    if (std::ssize(row) != ids.length) throw Error("ids are rows of several lengths; pad them, and give counts");
    ids.values.insert(ids.values.end(), row.begin(), row.end());
  }
  if (ids.values.empty()) throw Error("ids are empty; give at least one row of one token");
  return ids;
}

class Server {
 public:
  explicit Server(const ModelOptions& options) : model_(options.bundle, options.backend) {}

  Json greeting() const {
    const Manifest& m = model_.manifest();
    return {{"target", m.target},
            {"dtype", m.dtype},
            {"vocab_size", m.vocab_size},
            {"max_seq_len", m.max_seq_len},
            {"cached", m.is_cached()}};
  }

  Answer answer(const std::string& text) {
    const Json request = Json::parse(text);
    const std::string op = request.at("op");
    Answer answer;
    if (op == "forward") {
      const Ids ids = read_ids(request);
      answer.logits = model_.forward(ids.values, ids.rows);
    } else {
      run(op, request, answer);
      Json& positions = answer.line["positions"] = Json::array();
      for (std::int64_t row = 0; row < session().rows(); ++row) positions.push_back(session().position(row));
    }
    if (answer.logits) {
      answer.line["logits"] = {answer.logits->batch, answer.logits->length, answer.logits->vocab};
    }
    return answer;
  }

 private:
  void run(const std::string& op, const Json& request, Answer& answer) {
    if (op == "new") {
      session_.reset();  // its memory first
      session_.emplace(model_.new_session(request.at("rows")));
    } else if (op == "append") {
      const Ids ids = read_ids(request);
      const std::vector<std::int64_t> all(static_cast<std::size_t>(ids.rows), ids.length);
      answer.logits = session().append_ragged(ids.values, ids.length, request.value("counts", all),
                                              request.value("logits_to_keep", std::vector<std::int64_t>{}));
    } else if (op == "rollback") {
      session().rollback(request.at("row"), request.at("position"));
    } else if (op == "select") {
      session().select_rows(request.at("source").get<std::vector<TokenId>>());
    } else if (op == "reset") {
      session().reset();
    } else {
      throw Error("there is no op '" + op + "'; there are new, append, rollback, select, reset and forward");
    }
  }

  Session& session() {
    if (!session_) throw Error("there is no session yet; begin with {\"op\": \"new\", \"rows\": N}");
    return *session_;
  }

  NanoChat model_;
  std::optional<Session> session_;
};

void run_session(const ModelOptions& options) {
  Server server(options);
  use_binary_output();
  write_out(server.greeting().dump() + "\n");
  for (std::string text; std::getline(std::cin, text);) {
    Answer answer;
    try {
      answer = server.answer(text);
    } catch (const Error& error) {
      answer.line = {{"error", error.what()}};
    } catch (const Json::exception& error) {
      answer.line = {{"error", std::string("not a request as docs/session.md has them: ") + error.what()}};
    }
    write_out(answer.line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
    if (!answer.logits) continue;
    const auto bytes = std::as_bytes(answer.logits->data);
    write_out({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  }
}

}  // namespace

void add_session(CLI::App& app, int& exit_code) {
  const auto options = std::make_shared<ModelOptions>();
  CLI::App* verb = app.add_subcommand(
      "session", "A session for another program: requests on standard input, a line of JSON each, logits back");
  add_model_options(*verb, *options);
  verb->callback([options, &exit_code] {
    run_session(*options);
    exit_code = 0;
  });
}

}  // namespace nanochat_x::app
