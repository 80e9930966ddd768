#include <doctest/doctest.h>

#include <filesystem>
#include <string>

#include "bundle_files.h"
#include "error_of.h"
#include "nanochat_x/bundle.h"
#include "sha256.h"
#include "text.h"

using namespace nanochat_x;
using namespace nanochat_x::test;
using nlohmann::json;
namespace fs = std::filesystem;

namespace {

using Change = std::function<void(json&)>;

/// The error of opening a bundle whose manifest was changed.
std::string open_error(const Change& change) {
  const BundleFiles files(change);
  return error_of([&] { Bundle::open(files.path()); });
}

/// The error of opening a bundle whose manifest is this text.
std::string text_error(const std::string& text) {
  const BundleFiles files;
  write_manifest_text(files.path(), text);
  return error_of([&] { Bundle::open(files.path()); });
}

/// The error of opening a bundle after something was done to its folder.
std::string folder_error(const std::function<void(const BundleFiles&)>& damage) {
  const BundleFiles files;
  damage(files);
  return error_of([&] { Bundle::open(files.path()); });
}

}  // namespace

TEST_CASE("a whole bundle is read") {
  const BundleFiles files;
  const Bundle bundle = Bundle::open(files.path());
  const Manifest& m = bundle.manifest();
  CHECK(m.schema_version == 3);
  CHECK(m.target == "aoti");
  CHECK(m.dtype == "bfloat16");
  CHECK(m.generation == "smear");
  CHECK(m.n_layer == 4);
  CHECK(m.n_kv_head == 3);
  CHECK(m.head_dim == 16);
  CHECK(m.vocab_size == 2048);
  CHECK(m.sequence_len == 512);
  CHECK(m.max_seq_len == 1024);
  CHECK(m.march == "x86-64-v3");
  CHECK(m.torch_version == "2.13.0+cpu");
  CHECK(m.programs.at("decode") == "decode.so");
  CHECK(m.weights == "weights.safetensors");
  CHECK(m.tokenizer == "tokenizer.json");
  REQUIRE(m.files.size() == 5);
  CHECK(m.files[0].sha256 == kAbcHash);
  CHECK(m.files[0].size == 3);
  CHECK(bundle.path_of("decode.so") == files / "decode.so");
  bundle.verify_hashes();
  bundle.check_machine("");
}

TEST_CASE("unknown keys, a folder inside and weights inside the programs are accepted") {
  const BundleFiles files([](json& m) {
    m["something"] = {{"new", 1}};
    m["weights"] = "";
    m["tokenizer"] = "text/tokenizer.json";
    m["files"][3]["path"] = "text/tokenizer.json";
  });
  fs::create_directory(files / "text");
  fs::rename(files / "tokenizer.json", files / "text/tokenizer.json");
  const Bundle bundle = Bundle::open(files.path());
  CHECK(bundle.manifest().weights.empty());
  CHECK(bundle.path_of("text/tokenizer.json") == files / "text/tokenizer.json");
}

TEST_CASE("what may be left out") {
  const BundleFiles baseline([](json& m) { m["machine"].erase("cpu_features"); });
  CHECK(Bundle::open(baseline.path()).manifest().cpu_features.empty());

  const BundleFiles portable([](json& m) {
    m["target"] = "onnx";
    m["machine"] = json::object();
    m["programs"] = {{"full", "full.so"}};
  });
  const Bundle bundle = Bundle::open(portable.path());
  CHECK(bundle.manifest().architecture.empty());
  CHECK(bundle.manifest().programs.at("full") == "full.so");
  CHECK_FALSE(bundle.manifest().is_cached());
  bundle.check_machine("2.13.0");
  CHECK(contains(open_error([](json& m) {
                   m["target"] = "onnx";
                   m["machine"] = {{"march", 3}};
                 }),
                 "machine.march: must be a string"));
}

TEST_CASE("path_of gives listed files alone") {
  const BundleFiles files;
  const Bundle bundle = Bundle::open(files.path());
  CHECK(contains(error_of([&] { (void)bundle.path_of("other.so"); }), "\"other.so\" is not listed"));
}

TEST_CASE("no bundle there") {
  const TempDir dir;
  CHECK(contains(error_of([&] { Bundle::open(dir / "none"); }), "there is no such bundle"));
  CHECK(contains(error_of([&] { Bundle::open(dir.path()); }), "has no manifest.json"));
  write_file(dir / "file", "x");
  CHECK(contains(error_of([&] { Bundle::open(dir / "file"); }), "which is a folder"));
  fs::create_directory(dir / "manifest.json");
  CHECK(contains(error_of([&] { Bundle::open(dir.path()); }), "\"manifest.json\" is no file"));
}

TEST_CASE("a newer schema is refused before anything else") {
  const std::string newer = "has schema version 4, but this runner reads schema 3; update nanochat_x";
  CHECK(contains(text_error(R"({"schema_version": 4})"), newer));
  CHECK(contains(text_error(R"({"files": 7, "schema_version": 4, "target": []})"), newer));
  CHECK(contains(text_error(R"({"schema_version": 18446744073709551615})"), "update nanochat_x"));
}

TEST_CASE("schema versions that cannot be") {
  for (const char* version : {"0", "-1"}) {
    CHECK(contains(text_error(std::string(R"({"schema_version": )") + version + "}"),
                   "and this runner reads 3; lower it again"));
  }
  for (const char* version : {"1.0", "\"1\"", "null", "true", "1e30", "99999999999999999999"}) {
    CHECK(contains(text_error(std::string(R"({"schema_version": )") + version + "}"),
                   "schema_version: must be an integer"));
  }
  CHECK(contains(text_error("{}"), "schema_version: is missing; lower it again"));
}

TEST_CASE("what is no JSON object") {
  CHECK(contains(text_error(""), "manifest.json: is not valid JSON"));
  CHECK(contains(text_error("{\"schema_version\": 1"), "is not valid JSON (at byte"));
  CHECK(contains(text_error("{\"schema_version\": 1}x"), "is not valid JSON"));
  CHECK(contains(text_error("{\"schema_version\": 1, \"target\": \"\xff\"}"), "is not valid JSON"));
  CHECK(contains(text_error("{\"schema_version\": 1, \"n\": 1e999}"), "has a number that is out of range"));
  CHECK(contains(text_error("[1]"), "must be an object, not array"));
  CHECK(contains(text_error("7"), "must be an object, not an integer"));
}

TEST_CASE("hostile JSON") {
  CHECK(contains(text_error(std::string(5'000'000, '[')), "nests deeper than 32"));
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  CHECK(contains(text_error(objects), "nests deeper than 32"));
  CHECK(contains(text_error(R"({"schema_version": 1, "schema_version": 1})"), "has the key \"schema_version\" twice"));
  CHECK(contains(text_error(R"({"a": {"x\ny": 1, "x\ny": 1}})"), R"(has the key "x\x0ay" twice)"));
  CHECK(contains(text_error(std::string((std::size_t{16} << 20) + 1, ' ')), "is larger than 16 MiB"));
}

TEST_CASE("every key is needed") {
  const json whole = valid_manifest();
  for (const auto& item : whole.items()) {
    CAPTURE(item.key());
    CHECK(contains(open_error([&](json& m) { m.erase(item.key()); }), item.key() + ": is missing; lower it again"));
  }
  for (const char* key : {"generation", "n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size", "sequence_len"}) {
    CAPTURE(key);
    CHECK(contains(open_error([&](json& m) { m["model"].erase(key); }), std::string("model.") + key + ": is missing"));
  }
  for (const char* key : {"platform", "architecture", "march", "torch_version"}) {
    CAPTURE(key);
    CHECK(contains(open_error([&](json& m) { m["machine"].erase(key); }),
                   std::string("machine.") + key + ": is missing"));
  }
  for (const char* key : {"path", "size", "sha256"}) {
    CAPTURE(key);
    CHECK(contains(open_error([&](json& m) { m["files"][2].erase(key); }),
                   std::string("files[2].") + key + ": is missing"));
  }
  for (const char* key : {"prefill", "decode", "full"}) {
    CAPTURE(key);
    CHECK(contains(open_error([&](json& m) { m["programs"].erase(key); }),
                   std::string("programs.") + key + ": is missing"));
  }
}

TEST_CASE("every key has its type") {
  const json whole = valid_manifest();
  for (const auto& item : whole.items()) {
    for (const json& wrong : {json(1.5), json(true)}) {
      CAPTURE(item.key());
      CHECK(contains(open_error([&](json& m) { m[item.key()] = wrong; }), item.key() + ": must be "));
    }
  }
  CHECK(
      contains(open_error([](json& m) { m["max_seq_len"] = "1024"; }), "max_seq_len: must be an integer, not string"));
  CHECK(contains(open_error([](json& m) { m["programs"]["full"] = nullptr; }),
                 "programs.full: must be a string, not null"));
  CHECK(contains(open_error([](json& m) { m["special_tokens"]["<|bos|>"] = "1"; }), "must be an integer"));
  CHECK(contains(open_error([](json& m) { m["machine"]["cpu_features"] = {"avx2", 2}; }), "must hold strings alone"));
  CHECK(contains(open_error([](json& m) { m["files"][1] = "x"; }), "files[1]: must be an object, not string"));
}

TEST_CASE("values out of range") {
  CHECK(contains(open_error([](json& m) { m["target"] = "gguf"; }), "target: is \"gguf\", not one of aoti"));
  CHECK(contains(open_error([](json& m) { m["dtype"] = "int8"; }), "dtype: is \"int8\", not one of float32"));
  CHECK(contains(open_error([](json& m) { m["max_seq_len"] = 0; }), "max_seq_len: is 0, not within 1 to"));
  CHECK(contains(open_error([](json& m) { m["model"]["n_layer"] = -4; }), "model.n_layer: is -4"));
  CHECK(contains(open_error([](json& m) { m["model"]["vocab_size"] = std::uint64_t{1} << 63; }),
                 "model.vocab_size: is 9223372036854775808"));
  CHECK(contains(open_error([](json& m) { m["model"]["n_embd"] = 97; }), "model.n_embd: is no multiple of n_head"));
  CHECK(
      contains(open_error([](json& m) { m["model"]["n_kv_head"] = 4; }), "model.n_head: is no multiple of n_kv_head"));
  CHECK(contains(open_error([](json& m) { m["model"]["generation"] = ""; }), "model.generation: is empty"));
  CHECK(contains(open_error([](json& m) { m["special_tokens"]["<|bos|>"] = -1; }), "special_tokens.<|bos|>: is -1"));
  CHECK(contains(open_error([](json& m) { m["programs"] = json::object(); }), "programs: is empty"));
  CHECK(contains(open_error([](json& m) { m["files"][0]["size"] = -1; }), "files[0].size: is -1"));
  for (const std::string& hash :
       {std::string(63, 'a'), std::string(65, 'a'), std::string(64, 'A'), std::string(64, 'g')}) {
    CHECK(contains(open_error([&](json& m) { m["files"][0]["sha256"] = hash; }),
                   "files[0].sha256: must be 64 lower-case"));
  }
}

TEST_CASE("paths that could leave the bundle, or mean another thing elsewhere") {
  const std::pair<const char*, const char*> bad[] = {
      {"", "is an empty path"},
      {"/etc/passwd", "is an absolute path"},
      {"../x.so", "leaves the bundle with '..'"},
      {"a/../../x", "leaves the"},
      {"a/..", "leaves the bundle"},
      {"..", "leaves the bundle"},
      {"..\\x.so", "with a backslash"},
      {"C:/x.so", "with a colon"},
      {"a//b", "with an empty part"},
      {"./a", "with an empty part"},
      {"a/", "with an empty part"},
      {"a\nb", "with a control character"},
  };
  for (const auto& [path, fault] : bad) {
    CAPTURE(path);
    CHECK(contains(open_error([&](json& m) { m["files"][0]["path"] = path; }), fault));
    CHECK(contains(open_error([&](json& m) { m["tokenizer"] = path; }), fault));
    CHECK(contains(open_error([&](json& m) { m["programs"]["full"] = path; }), fault));
    if (*path != '\0') CHECK(contains(open_error([&](json& m) { m["weights"] = path; }), fault));
  }
  CHECK(contains(open_error([](json& m) { m["tokenizer"] = std::string(2000, 'a'); }), "more than 1024 bytes"));
  // a name with two dots is a name
  CHECK(contains(open_error([](json& m) { m["files"][0]["path"] = "a..b"; }),
                 "programs.prefill: \"prefill.so\" is not listed"));
}

TEST_CASE("files that are listed twice, or used and not listed") {
  CHECK(contains(open_error([](json& m) { m["files"].push_back(m["files"][0]); }),
                 "files[5]: lists \"prefill.so\" a second time"));
  CHECK(contains(open_error([](json& m) { m["files"][0]["path"] = "manifest.json"; }), "cannot hold its own hash"));
  CHECK(contains(open_error([](json& m) { m["files"].erase(4); }),
                 "weights: \"weights.safetensors\" is not listed in files"));
  CHECK(contains(open_error([](json& m) { m["files"].erase(3); }),
                 "tokenizer: \"tokenizer.json\" is not listed in files"));
  CHECK(contains(open_error([](json& m) { m["files"].erase(1); }),
                 "programs.decode: \"decode.so\" is not listed in files"));
}

TEST_CASE("files that are not as listed") {
  CHECK(contains(folder_error([](const auto& f) { fs::remove(f / "decode.so"); }),
                 "\"decode.so\" is missing; the bundle is damaged: lower it again"));
  CHECK(contains(folder_error([](const auto& f) { write_file(f / "decode.so", "ab"); }),
                 "\"decode.so\" has 2 bytes, but the manifest says 3"));
  CHECK(contains(folder_error([](const auto& f) {
                   fs::remove(f / "decode.so");
                   fs::create_directory(f / "decode.so");
                 }),
                 "\"decode.so\" is no file"));
}

#if !defined(_WIN32)
TEST_CASE("links must stay inside") {
  const TempDir outside;
  write_file(outside / "decode.so", kAbc);
  const auto link = [](const fs::path& to) {
    return [to](const BundleFiles& f) {
      fs::remove(f / "decode.so");
      fs::create_symlink(to, f / "decode.so");
    };
  };
  CHECK(contains(folder_error(link(outside / "decode.so")), "\"decode.so\" is a link that leaves the bundle"));
  CHECK(contains(folder_error(link("decode.so")), "\"decode.so\" is missing"));  // a circle
  CHECK(contains(folder_error(link("nothing")), "\"decode.so\" is missing"));

  const BundleFiles files;
  link("full.so")(files);
  CHECK(Bundle::open(files.path()).path_of("decode.so") == files / "decode.so");

  // a folder beside the bundle whose name begins with the bundle's
  const fs::path sibling = files.path().string() + "-other";
  fs::create_directory(sibling);
  write_file(sibling / "decode.so", kAbc);
  fs::remove(files / "decode.so");
  fs::create_symlink(sibling / "decode.so", files / "decode.so");
  CHECK(contains(error_of([&] { Bundle::open(files.path()); }), "is a link that leaves the bundle"));
  fs::remove_all(sibling);

  // a linked folder on the way, and a linked manifest
  CHECK(contains(open_error([](json& m) { m["files"][0]["path"] = "x/decode.so"; }), "programs.prefill"));
  const BundleFiles nested([](json& m) { m["tokenizer"] = m["files"][3]["path"] = "sub/tokenizer.json"; });
  write_file(outside / "tokenizer.json", kAbc);
  fs::create_directory_symlink(outside.path(), nested / "sub");
  CHECK(contains(error_of([&] { Bundle::open(nested.path()); }), "\"sub/tokenizer.json\" is a link that leaves"));
  CHECK(contains(folder_error([&](const auto& f) {
                   fs::rename(f / "manifest.json", outside / "manifest.json");
                   fs::create_symlink(outside / "manifest.json", f / "manifest.json");
                 }),
                 "\"manifest.json\" is a link that leaves the bundle"));
}

TEST_CASE("a bundle through a link or a relative path is a bundle") {
  const BundleFiles files;
  const TempDir other;
  fs::create_directory_symlink(files.path(), other / "link");
  Bundle::open(other / "link").verify_hashes();
  CHECK(Bundle::open(fs::relative(files.path())).manifest().n_layer == 4);
}

TEST_CASE("an opened bundle does not depend on the working directory") {
  const BundleFiles files;
  const fs::path before = fs::current_path();
  fs::current_path(files.path().parent_path());
  const Bundle bundle = Bundle::open(files.path().filename());
  fs::current_path(before);
  CHECK(bundle.folder() == files.path());
  bundle.verify_hashes();
}
#endif

TEST_CASE("a changed byte is found") {
  const BundleFiles files;
  write_file(files / "full.so", "abd");
  const Bundle bundle = Bundle::open(files.path());
  CHECK(contains(error_of([&] { bundle.verify_hashes(); }), "\"full.so\" differs from what was lowered (SHA-256)"));
  // of several, the first of the list
  write_file(files / "weights.safetensors", std::string(kTwoBlocks.size(), 'x'));
  write_file(files / "prefill.so", "abd");
  CHECK(contains(error_of([&] { bundle.verify_hashes(); }), "\"prefill.so\" differs"));
  fs::remove(files / "prefill.so");
  CHECK(contains(error_of([&] { bundle.verify_hashes(); }), "prefill.so: cannot be opened"));
}

TEST_CASE("one file's hash") {
  const BundleFiles files;
  const Bundle bundle = Bundle::open(files.path());
  bundle.verify_hash("full.so");
  write_file(files / "full.so", "abd");
  bundle.verify_hash("decode.so");
  CHECK(contains(error_of([&] { bundle.verify_hash("full.so"); }), "\"full.so\" differs from what was lowered"));
  CHECK(contains(error_of([&] { bundle.verify_hash("other.so"); }), "\"other.so\" is not listed"));
}

// The entry of `path` in a manifest.
static nlohmann::json& entry_of(nlohmann::json& manifest, const std::string& path) {
  for (nlohmann::json& file : manifest["files"]) {
    if (file["path"] == path) return file;
  }
  throw std::logic_error("no such file");
}

TEST_CASE("blocks: every byte of a file is covered, whatever their size") {
  const std::string text = kTwoBlocks;  // 56 bytes
  for (const std::size_t size : {1, 7, 28, 50, 55, 56, 1000}) {
    CAPTURE(size);
    const BundleFiles files([&](nlohmann::json& manifest) {
      nlohmann::json hashes = nlohmann::json::array();
      for (std::size_t begin = 0; begin < text.size(); begin += size) {
        hashes.push_back(internal::sha256_of(text.substr(begin, size)));
      }
      nlohmann::json& entry = entry_of(manifest, "weights.safetensors");
      entry["blocks"] = {{"size", size}, {"sha256", hashes}};
      entry["sha256"] = kAbcHash;  // that of another text: the blocks are what is read
    });
    const Bundle bundle = Bundle::open(files.path());
    bundle.verify_hashes();
    bundle.verify_hash("weights.safetensors");
    for (std::size_t at = 0; at < text.size(); ++at) {
      std::string changed = text;
      changed[at] ^= 1;
      write_file(files / "weights.safetensors", changed);
      CHECK(
          contains(error_of([&] { bundle.verify_hashes(); }), "\"weights.safetensors\" differs from what was lowered"));
      CHECK(contains(error_of([&] { bundle.verify_hash("weights.safetensors"); }), "\"weights.safetensors\" differs"));
    }
    for (const std::string& changed : {text + "x", text.substr(1), text.substr(0, 55), std::string()}) {
      write_file(files / "weights.safetensors", changed);  // since it was opened
      CHECK(contains(error_of([&] { bundle.verify_hashes(); }), "\"weights.safetensors\" differs"));
    }
  }
}

TEST_CASE("blocks: the first file that differs is the one that is named") {
  const BundleFiles files([](nlohmann::json& manifest) {
    for (const char* path : {"weights.safetensors", "decode.so"}) {
      entry_of(manifest, path)["blocks"] = {{"size", 1000}, {"sha256", {kAbcHash}}};
    }
  });
  const Bundle bundle = Bundle::open(files.path());
  CHECK(contains(error_of([&] { bundle.verify_hashes(); }), "\"weights.safetensors\" differs"));
  write_file(files / "decode.so", "abd");
  CHECK(contains(error_of([&] { bundle.verify_hashes(); }), "\"decode.so\" differs"));
}

TEST_CASE("blocks that cannot be") {
  const auto error = [](const nlohmann::json& blocks) {
    const BundleFiles files([&](nlohmann::json& m) { entry_of(m, "weights.safetensors")["blocks"] = blocks; });
    return error_of([&] { Bundle::open(files.path()); });
  };
  CHECK(contains(error({{"size", 28}, {"sha256", {kAbcHash}}}), "has 1 hashes of 2 blocks"));
  CHECK(contains(error({{"size", 28}, {"sha256", {kAbcHash, kAbcHash, kAbcHash}}}), "has 3 hashes of 2 blocks"));
  CHECK(contains(error({{"size", 28}, {"sha256", nlohmann::json::array()}}), "has 0 hashes of 2 blocks"));
  CHECK(contains(error({{"size", 0}, {"sha256", {kAbcHash}}}), "size"));
  CHECK(contains(error({{"size", -1}, {"sha256", {kAbcHash}}}), "size"));
  CHECK(contains(error({{"size", "28"}, {"sha256", {kAbcHash}}}), "size"));
  CHECK(contains(error({{"size", 56}, {"sha256", {"abc"}}}), "64 lower-case hexadecimal digits"));
  CHECK(contains(error({{"size", 56}, {"sha256", {1}}}), "sha256"));
  CHECK(contains(error({{"size", 56}}), "sha256"));
  CHECK(contains(error({1, 2}), "blocks"));
}

TEST_CASE("a manifest that was changed is refused") {
  const auto changed = [](const std::string& from, const std::string& to) {
    return folder_error([&](const BundleFiles& f) {
      std::string text = read_file(f / "manifest.json");
      REQUIRE(text.find(from) != std::string::npos);
      write_file(f / "manifest.json", text.replace(text.find(from), from.size(), to));
    });
  };
  const std::string refused = "manifest.json was changed since it was written (SHA-256 differs); lower the model again";
  CHECK(contains(changed("\"max_seq_len\":1024", "\"max_seq_len\":1025"), refused));
  CHECK(contains(changed(kTwoBlocksHash, std::string(64, '0')), refused));
  CHECK(contains(changed("\"max_seq_len\":1024", "\"max_seq_len\": 1024"), refused));  // means the same
  CHECK(contains(changed("\"target\"", "\"tarjet\""), refused));  // before what it says is looked at
  CHECK(contains(changed("\"schema_version\":3", "\"schema_version\":4"), "update nanochat_x"));
}

TEST_CASE("manifest.sha256") {
  // from hashlib
  const std::string text = R"({"schema_version": 3})";
  const std::string hash = "9d3363945f1da1c1dc9ecdd7b3b75ab8482c5a2e63adb56a8905443c249a8293";
  const auto with_sum = [&](const std::string& sum) {
    return folder_error([&](const BundleFiles& f) {
      write_file(f / "manifest.json", text);
      write_file(f / "manifest.sha256", sum);
    });
  };
  CHECK(contains(with_sum(hash + "\n"), "target: is missing"));  // the sum is right
  CHECK(contains(with_sum(std::string(64, '0') + "\n"), "was changed since it was written"));
  std::string upper = hash;
  upper[62] = 'A';
  for (const std::string& sum :
       {std::string(), std::string("\n"), hash, hash + "\n\n", hash + " ", hash + "\r\n", hash.substr(1) + "\n",
        " " + hash.substr(1) + "\n", upper + "\n", hash + "  manifest.json\n", std::string(100'000, 'a')}) {
    CAPTURE(sum);
    CHECK(contains(with_sum(sum), "manifest.sha256: is not 64 lower-case hexadecimal digits and a line feed"));
  }
  CHECK(contains(folder_error([](const auto& f) { fs::remove(f / "manifest.sha256"); }),
                 "\"manifest.sha256\" is missing; the bundle is damaged: lower it again"));
  // a newer schema is refused first, whatever became of the sum
  CHECK(contains(folder_error([](const auto& f) {
                   fs::remove(f / "manifest.sha256");
                   write_file(f / "manifest.json", R"({"schema_version": 4})");
                 }),
                 "update nanochat_x"));
  CHECK(contains(open_error([](json& m) { m["files"][0]["path"] = "manifest.sha256"; }), "is made of the manifest"));
}

TEST_CASE("SHA-256 of files") {
  const TempDir dir;
  const auto hash = [&](const std::string& text) {
    write_file(dir / "f", text);
    return sha256_file(dir / "f");
  };
  CHECK(hash("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(hash(kAbc) == kAbcHash);
  CHECK(hash(kTwoBlocks) == kTwoBlocksHash);
  CHECK(hash(std::string(1'000'000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  // from hashlib: one block of the reader, and one byte more than three
  CHECK(hash(std::string(1 << 20, '\0')) == "30e14955ebf1352266dc2ff8067e68104607e750abb9d3b36582b8af909fcb58");
  CHECK(hash(std::string((3 << 20) + 1, '\0')) == "5983281b51c767c831104f52c95e4075f27e6f4fa8dd0526e3929f79176a1217");
  CHECK(contains(error_of([&] { sha256_file(dir / "none"); }), "none: cannot be opened"));
  CHECK(contains(error_of([&] { sha256_file(dir.path()); }), "cannot be"));
}

TEST_CASE("text for errors is one line") {
  CHECK(internal::in_quotes("a\n\x1b[31m\x7f") == R"("a\x0a\x1b[31m\x7f")");
  CHECK(internal::in_quotes("\xc2\x9b[31m \xc2\xa0\xc3\x9b") == "\"\\xc2\\x9b[31m \xc2\xa0\xc3\x9b\"");  // C1's CSI
  CHECK(internal::without_controls(std::string(300, 'x') + "\t") == std::string(300, 'x') + "\\x09");
  CHECK(internal::printable(std::string(300, 'x')) == std::string(200, 'x') + "...");
  CHECK(internal::printable(std::string(199, 'x') + "\xf0\x9f\x98\x80") ==
        std::string(199, 'x') + "...");  // whole ones
}
