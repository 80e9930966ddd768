#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "nanochat_x/error.h"
#include "nanochat_x/nanochat.h"
#include "options.h"
#include "process.h"
#include "text.h"

namespace nanochat_x::app {
namespace {

using nlohmann::ordered_json;

struct InfoOptions {
  std::filesystem::path bundle;
  bool json = false;
};

// Why this program cannot run the bundle here; nothing if it can.
std::optional<std::string> obstacle(const Bundle& bundle) {
  try {
    check_runnable(bundle);
  } catch (const Error& error) {
    return error.what();
  }
  return std::nullopt;
}

std::string human_size(std::uint64_t bytes) {
  constexpr const char* kUnits[] = {"B", "kB", "MB", "GB", "TB"};
  auto size = static_cast<double>(bytes);
  std::size_t unit = 0;
  for (; size >= 999.5 && unit + 1 < std::size(kUnits); ++unit) size /= 1000;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.1f %s", size, kUnits[unit]);
  return text;
}

// What the programs need of this machine, one by one.
ordered_json checks_json(const Bundle& bundle) {
  ordered_json checks = ordered_json::array();
  for (const MachineCheck& check : bundle.machine_checks(backend_version())) {
    checks.push_back({{"name", check.name},
                      {"needed", check.needed},
                      {"fits", check.fits()},
                      {"problem", check.problem},
                      {"remedy", check.remedy}});
  }
  return checks;
}

ordered_json as_json(const Bundle& bundle, const std::optional<std::string>& obstacle) {
  const Manifest& m = bundle.manifest();
  ordered_json files = ordered_json::array();
  for (const BundleFile& file : m.files) {
    files.push_back({{"path", file.path}, {"size", file.size}, {"sha256", file.sha256}});
  }
  return {{"bundle", bundle.folder().string()},
          {"schema_version", m.schema_version},
          {"target", m.target},
          {"dtype", m.dtype},
          {"generation", m.generation},
          {"n_layer", m.n_layer},
          {"n_kv_head", m.n_kv_head},
          {"head_dim", m.head_dim},
          {"vocab_size", m.vocab_size},
          {"sequence_len", m.sequence_len},
          {"max_seq_len", m.max_seq_len},
          {"platform", m.platform},
          {"architecture", m.architecture},
          {"march", m.march},
          {"cpu_features", m.cpu_features},
          {"torch_version", m.torch_version},
          {"runtime_version", m.runtime_version},
          {"programs", m.programs},
          {"weights", m.weights},
          {"tokenizer", m.tokenizer},
          {"files", files},
          {"checks", checks_json(bundle)},
          {"runs_here", !obstacle},
          {"obstacle", obstacle ? ordered_json(*obstacle) : ordered_json()}};
}

// What the programs need of a machine, in one line.
std::string needs(const Manifest& m) {
  std::string text;
  const auto add = [&text](const std::string& what) {
    if (!what.empty()) text += (text.empty() ? "" : ", ") + what;
  };
  add(m.platform + (m.platform.empty() || m.architecture.empty() ? "" : " ") + m.architecture);
  add(m.march);
  add(m.torch_version.empty() ? "" : "torch " + m.torch_version);
  add(m.runtime_version.empty() ? "" : m.target + " runtime " + m.runtime_version + " or newer");
  return text.empty() ? "nothing special" : text;
}

std::string as_text(const Bundle& bundle, const std::optional<std::string>& obstacle) {
  const Manifest& m = bundle.manifest();
  const auto number = [](std::int64_t n) { return std::to_string(n); };
  std::string text;
  const auto line = [&text](std::string name, const std::string& value) {
    name.resize(14, ' ');
    text += name + internal::without_controls(value) + "\n";  // a manifest must not talk to the terminal
  };
  line("bundle", internal::display(bundle.folder()));
  line("target", m.target + ", " + m.dtype);
  line("model", m.generation + ": " + number(m.n_layer) + " layers, " + number(m.n_kv_head) + " KV heads of " +
                    number(m.head_dim) + ", vocabulary " + number(m.vocab_size));
  line("context", number(m.max_seq_len) + " tokens (trained on " + number(m.sequence_len) + ")");
  line("needs", needs(m));
  std::uint64_t total = 0;
  for (const BundleFile& file : m.files) total += file.size;
  line("files", human_size(total) + ", every SHA-256 as the manifest says");
  for (const BundleFile& file : m.files) line("", file.path + " (" + human_size(file.size) + ")");
  line("this machine", obstacle ? "cannot run it: " + *obstacle : "can run it");
  return text;
}

void run_info(const InfoOptions& options) {
  const Bundle bundle = Bundle::open(options.bundle);
  bundle.verify_hashes();
  const auto why_not = obstacle(bundle);
  write_out(options.json ? as_json(bundle, why_not).dump(-1, ' ', false, ordered_json::error_handler_t::replace) + "\n"
                         : as_text(bundle, why_not));
}

}  // namespace

void add_info(CLI::App& app, int& exit_code) {
  const auto options = std::make_shared<InfoOptions>();
  CLI::App* verb = app.add_subcommand("info", "What a bundle holds, whether it is whole and runs here");
  verb->add_option("BUNDLE", options->bundle, "Folder that `nanochat_x lower` wrote")->required();
  verb->add_flag("--json", options->json, "One JSON object");
  verb->callback([options, &exit_code] {
    run_info(*options);
    exit_code = 0;
  });
}

}  // namespace nanochat_x::app
