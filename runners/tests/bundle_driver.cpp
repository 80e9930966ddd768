// What a program does with a bundle before it opens the programs in it, behind JSON lines (tests/test_spoilt_files.py).
//
//   bundle_driver TARGET VERSION      as the program of that target, with that version of its runtime
//
//   {"path": FOLDER}     -> {"opened": true} if the backend would now have been asked to open the bundle's programs;
//                           {"error": TEXT, "opened": false} if the bundle was refused before
//
// The whole way is the library's own (NanoChat): only the backend, which would load code, is one that takes note.

#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "json_lines.h"
#include "nanochat_x/backend.h"
#include "nanochat_x/nanochat.h"

namespace {

using Json = nlohmann::json;

std::string target, version;
bool opened = false;

class Driver {
 public:
  static Json answer(const Json& request) {
    opened = false;
    try {
      const nanochat_x::NanoChat model(request.at("path").get<std::string>());
      return {{"opened", opened}};
    } catch (const nanochat_x::Error& error) {
      return {{"error", error.what()}, {"opened", opened}};
    }
  }
};

/// Never asked for anything.
class NoBackend : public nanochat_x::Backend {
 public:
  nanochat_x::Logits forward(std::span<const std::int64_t>, std::int64_t, std::int64_t) override { return {}; }
  nanochat_x::Logits step(const nanochat_x::Step&, nanochat_x::Cache&) override { return {}; }
  std::unique_ptr<nanochat_x::Cache> new_cache(std::int64_t, std::int64_t) override { return nullptr; }
};

}  // namespace

namespace nanochat_x {

std::unique_ptr<Backend> open_backend(const Bundle&, const BackendOptions&) {
  opened = true;
  return std::make_unique<NoBackend>();
}
std::string backend_name() { return target; }
std::string backend_version() { return version; }

}  // namespace nanochat_x

int main(int argc, char** argv) {
  return serve_json_lines("bundle_driver", [&] {
    if (argc != 3) throw std::invalid_argument("usage: bundle_driver TARGET VERSION");
    target = argv[1];
    version = argv[2];
    return Driver();
  });
}
