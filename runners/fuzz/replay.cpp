// The checks of the fuzz targets without libFuzzer, for any compiler: over the files of some folders, and over random
// changes of each.
//
//   fuzz_replay CHECK CHANGES FOLDER...     prints how many inputs were tried; the first that breaks a promise, in hex,
//                                           ends it with exit code 1. The check `never` is passed by nothing

#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "checks.h"

namespace {

namespace fs = std::filesystem;

/// One to four small changes: bits, bytes, pieces taken out, doubled, or taken from another input.
std::string changed(std::string bytes, const std::vector<std::string>& others, std::mt19937_64& random) {
  const auto below = [&random](std::size_t n) {
    return static_cast<std::size_t>(random() % std::max<std::size_t>(n, 1));
  };
  for (std::size_t times = 1 + below(4); times > 0; --times) {
    const std::size_t at = below(bytes.size() + 1), length = below(1 + below(bytes.size() + 1 - at));
    const std::string& other = others[below(others.size())];
    switch (below(5)) {
      case 0:
        if (at < bytes.size()) bytes[at] = static_cast<char>(bytes[at] ^ 1 << below(8));
        break;
      case 1:
        bytes.insert(at, 1, static_cast<char>(random()));
        break;
      case 2:
        bytes.erase(at, length);
        break;
      case 3:
        bytes.insert(at, bytes.substr(at, length));
        break;
      default:
        bytes.replace(at, length, other, below(other.size()), below(32));
    }
  }
  return bytes;
}

std::vector<std::string> read_all(int count, char** folders) {
  std::vector<fs::path> files;
  for (int i = 0; i < count; ++i) {
    for (const auto& entry : fs::directory_iterator(folders[i])) files.push_back(entry.path());
  }
  std::ranges::sort(files);
  std::vector<std::string> inputs;
  for (const fs::path& file : files) inputs.push_back(nanochat_x::test::read_file(file));
  return inputs;
}

constexpr nanochat_x::fuzz::Check kNever = {
    "never", [](std::string_view) { nanochat_x::fuzz::demand(false, "this check is never passed"); }};

bool passes(const nanochat_x::fuzz::Check& check, const std::string& input) {
  try {
    check.run(input);
    return true;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\ninput: ", std::string(check.name).c_str(), error.what());
    for (const char c : input) std::fprintf(stderr, "%02x", static_cast<unsigned>(static_cast<unsigned char>(c)));
    std::fputc('\n', stderr);
    return false;
  }
}

int replay(const nanochat_x::fuzz::Check& check, int changes, const std::vector<std::string>& inputs) {
  std::mt19937_64 random(1);
  std::size_t tried = 0;
  for (const std::string& input : inputs) {
    for (int i = 0; i <= changes; ++i, ++tried) {
      if (!passes(check, i == 0 ? input : changed(input, inputs, random))) return 1;
    }
  }
  std::printf("%zu inputs\n", tried);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::string name = argc > 3 ? argv[1] : "";
    const auto check = std::ranges::find(nanochat_x::fuzz::kChecks, name, &nanochat_x::fuzz::Check::name);
    if (name == kNever.name) return replay(kNever, 0, read_all(argc - 3, argv + 3));
    if (check != nanochat_x::fuzz::kChecks.end())
      return replay(*check, std::stoi(argv[2]), read_all(argc - 3, argv + 3));
    std::fprintf(stderr, "usage: fuzz_replay CHECK CHANGES FOLDER...; the checks are");
    for (const auto& known : nanochat_x::fuzz::kChecks) std::fprintf(stderr, " %s", std::string(known.name).c_str());
    std::fputc('\n', stderr);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fuzz_replay: %s\n", error.what());
  }
  return 2;
}
