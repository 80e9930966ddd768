// A session on a real bundle behind JSON lines, for tests/test_session.py: one request a line on stdin, one answer a
// line on stdout, {"error": ...} where the library throws.
//
//   session_driver BUNDLE
//
//   {"op": "new", "rows": N}                      a new session
//   {"op": "append", "ids": [[...], ...]}         one list a row, all of one length; the answer has "logits" [B, T, V].
//     and "counts": [...]                         Fed raggedly: the rest of a row is padding, its logits mean nothing
//   {"op": "rollback", "row": R, "position": P}
//   {"op": "select", "source": [...]}
//   {"op": "reset"}
//
// Every answer without an error has "positions": the length of each row.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "json_lines.h"
#include "nanochat_x/error.h"
#include "nanochat_x/nanochat.h"

namespace {

using Json = nlohmann::json;
using Ids = std::vector<std::int64_t>;

Json as_lists(const nanochat_x::Logits& logits) {
  Json rows = Json::array();
  for (std::int64_t b = 0; b < logits.batch; ++b) {
    Json& row = rows.emplace_back(Json::array());
    for (std::int64_t t = 0; t < logits.length; ++t) {
      const auto values = logits.at(b, t);
      row.push_back(std::vector<float>(values.begin(), values.end()));
    }
  }
  return rows;
}

class Driver {
 public:
  explicit Driver(const std::string& bundle) : model_(bundle) {}

  Json answer(const Json& request) {
    const std::string op = request.at("op");
    Json answer = Json::object();
    if (op == "new") {
      session_.emplace(model_.new_session(request.at("rows")));
    } else if (op == "append") {
      answer["logits"] = as_lists(append(request));
    } else if (op == "rollback") {
      session().rollback(request.at("row"), request.at("position"));
    } else if (op == "select") {
      session().select_rows(request.at("source").get<Ids>());
    } else if (op == "reset") {
      session().reset();
    } else {
      throw std::invalid_argument("unknown op " + op);
    }
    Json& positions = answer["positions"] = Json::array();
    for (std::int64_t row = 0; row < session().rows(); ++row) positions.push_back(session().position(row));
    return answer;
  }

 private:
  nanochat_x::Logits append(const Json& request) {
    const std::vector<Ids> rows = request.at("ids");
    Ids ids;
    for (const Ids& row : rows) {
      if (row.size() != rows.front().size()) throw std::invalid_argument("rows of several lengths: pad them");
      ids.insert(ids.end(), row.begin(), row.end());
    }
    const auto length = rows.empty() ? 0 : std::ssize(rows.front());
    if (!request.contains("counts")) return session().append(ids, length);
    return session().append_ragged(ids, length, request.at("counts").get<Ids>());
  }

  nanochat_x::Session& session() {
    if (!session_) throw std::invalid_argument("no session yet");
    return *session_;
  }

  nanochat_x::NanoChat model_;
  std::optional<nanochat_x::Session> session_;
};

}  // namespace

int main(int argc, char** argv) {
  return serve_json_lines("session_driver", [&] {
    if (argc != 2) throw std::invalid_argument("usage: session_driver BUNDLE");
    return Driver(argv[1]);
  });
}
