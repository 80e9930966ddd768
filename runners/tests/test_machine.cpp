#include <doctest/doctest.h>

#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "bundle_files.h"
#include "error_of.h"
#include "machine.h"
#include "nanochat_x/bundle.h"

using namespace nanochat_x;
using namespace nanochat_x::test;
using nlohmann::json;

namespace {

/// What check_machine says to a bundle whose `machine` has this value at this key.
std::string machine_error(const std::string& key, const json& value, std::string_view runtime = "") {
  const BundleFiles files([&](json& m) { m["machine"][key] = value; });
  const Bundle bundle = Bundle::open(files.path());
  return error_of([&] { bundle.check_machine(runtime); });
}

}  // namespace

TEST_CASE("a bundle for this machine is accepted") {
  CHECK(machine_error("platform", internal::platform_name()) == "");
  CHECK(machine_error("architecture", internal::architecture_name()) == "");
#if defined(__linux__) && defined(__x86_64__)
  CHECK(internal::platform_name() == "linux");
  CHECK(internal::architecture_name() == "x86_64");
  CHECK(machine_error("architecture", "AMD64") == "");
  CHECK(machine_error("cpu_features", {"sse2", "cmov"}) == "");  // every x86-64 CPU
#endif
}

TEST_CASE("a bundle for another machine is refused") {
  CHECK(contains(machine_error("platform", "beos"),
                 "was lowered for \"beos\", this machine runs " + internal::platform_name()));
  CHECK(contains(machine_error("architecture", "riscv64"), "was lowered for \"riscv64\", this machine is"));
  CHECK(contains(machine_error("architecture", "riscv64"),
                 "lower it on this machine: `python -m nanochat_x lower --target aoti`"));
  const std::string lacking = machine_error("cpu_features", {"avx1024f", "mystery\n"});
  CHECK(contains(lacking, "a CPU (x86-64-v3) with avx1024f, mystery\\x0a, which this machine lacks; lower it"));
}

// What check_machine says of a bundle that needs `needed` of its runtime, under that `runtime`.
std::string runtime_error(const std::string& needed, const std::string& runtime) {
  const BundleFiles files([&](json& m) {
    m["target"] = "onnx";
    m["machine"] = {{"runtime_version", needed}};
  });
  return error_of([&] { Bundle::open(files.path()).check_machine(runtime); });
}

TEST_CASE("a runtime that is older than the programs need is refused, a newer one is not") {
  for (const char* runtime : {"1.23.0", "1.23", "1.23.5+cpu", "1.24rc1", "1.100", "2.0", ""}) {
    CAPTURE(runtime);
    CHECK(runtime_error("1.23.0", runtime) == "");
  }
  for (const char* runtime : {"1.22.9", "1.9.12", "0.99", "1", "nonsense"}) {
    CAPTURE(runtime);
    CHECK(contains(runtime_error("1.23.0", runtime),
                   "needs version 1.23.0 or newer of the onnx runtime, but this program runs " + std::string(runtime)));
  }
  CHECK(runtime_error("", "0.1") == "");
}

TEST_CASE("the runtime's torch must have the major and minor number of the bundle's") {
  CHECK(machine_error("torch_version", "2.13.0+cpu", "2.13.0") == "");
  CHECK(machine_error("torch_version", "2.13.1", "2.13.0+cu130") == "");
  CHECK(machine_error("torch_version", "2.13.0a0+git1", "2.13") == "");
  CHECK(machine_error("torch_version", "2.12.0", "") == "");
  CHECK(machine_error("torch_version", "", "2.13.0") == "");
  for (const char* other : {"2.12.0", "2.1.0", "2.130.0", "3.13.0", "2", "nonsense"}) {
    CAPTURE(other);
    CHECK(contains(machine_error("torch_version", other, "2.13.0"),
                   "but this program runs libtorch 2.13.0; lower it again"));
  }
}

TEST_CASE("features that do not exist are lacking") {
  for (const char* name : {"", "avx3", "avx2 ", "AVX2", "\xff", "-"}) CHECK_FALSE(cpu_has_feature(name));
}

#if defined(__linux__) && defined(__x86_64__)
TEST_CASE("features agree with /proc/cpuinfo") {
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::string line;
  while (std::getline(cpuinfo, line) && !line.starts_with("flags")) {
  }
  REQUIRE(line.starts_with("flags"));
  std::istringstream words(line);
  const std::set<std::string> flags{std::istream_iterator<std::string>(words), {}};
  REQUIRE(flags.contains("sse2"));

  const std::pair<const char*, const char*> names[] = {
      // the compilers' name, Linux' name
      {"sse3", "pni"},
      {"ssse3", "ssse3"},
      {"sse4.1", "sse4_1"},
      {"sse4.2", "sse4_2"},
      {"popcnt", "popcnt"},
      {"avx", "avx"},
      {"avx2", "avx2"},
      {"fma", "fma"},
      {"f16c", "f16c"},
      {"bmi", "bmi1"},
      {"bmi2", "bmi2"},
      {"lzcnt", "abm"},
      {"movbe", "movbe"},
      {"aes", "aes"},
      {"pclmul", "pclmulqdq"},
      {"sha", "sha_ni"},
      {"vaes", "vaes"},
      {"gfni", "gfni"},
      {"vpclmulqdq", "vpclmulqdq"},
      {"rdrnd", "rdrand"},
      {"rdseed", "rdseed"},
      {"adx", "adx"},
      {"sse4a", "sse4a"},
      {"cx16", "cx16"},
      {"fsgsbase", "fsgsbase"},
      {"clwb", "clwb"},
      {"clflushopt", "clflushopt"},
      {"avxvnni", "avx_vnni"},
      {"avx512f", "avx512f"},
      {"avx512bw", "avx512bw"},
      {"avx512vl", "avx512vl"},
      {"avx512dq", "avx512dq"},
      {"avx512cd", "avx512cd"},
      {"avx512vnni", "avx512_vnni"},
      {"avx512bf16", "avx512_bf16"},
      {"avx512vbmi", "avx512vbmi"},
      {"avx512ifma", "avx512ifma"},
      {"avx512vbmi2", "avx512_vbmi2"},
      {"avx512bitalg", "avx512_bitalg"},
      {"avx512vpopcntdq", "avx512_vpopcntdq"},
      {"avx512fp16", "avx512_fp16"},
      {"amx-tile", "amx_tile"},
      {"amx-bf16", "amx_bf16"},
      {"amx-int8", "amx_int8"},
      {"xsavec", "xsavec"},
      {"prfchw", "3dnowprefetch"},
  };
  for (const auto& [ours, theirs] : names) {
    CAPTURE(ours);
    CHECK(cpu_has_feature(ours) == flags.contains(theirs));
    CHECK(cpu_has_feature(theirs) == flags.contains(theirs));
  }
}
#endif

TEST_CASE("each need of a bundle is a check of its own, and what it does not name is none") {
  const BundleFiles anywhere([](json& m) {
    m["target"] = "onnx";
    m["machine"] = json::object();
  });
  CHECK(Bundle::open(anywhere.path()).machine_checks("2.13.0").empty());
  const BundleFiles files([](json& m) {
    m["machine"] = {{"platform", internal::platform_name()},
                    {"architecture", "riscv64"},
                    {"march", "rv64gc"},
                    {"cpu_features", {"zvfh"}},
                    {"torch_version", "2.13.0"},
                    {"runtime_version", "9.9"}};
  });
  const auto checks = Bundle::open(files.path()).machine_checks("2.13.0");
  REQUIRE(checks.size() == 5);
  const std::vector<std::string> names = {"platform", "architecture", "cpu_features", "torch", "runtime"};
  const std::vector<bool> fits = {true, false, false, true, false};
  for (std::size_t i = 0; i < checks.size(); ++i) {
    CAPTURE(names[i]);
    CHECK(checks[i].name == names[i]);
    CHECK(checks[i].fits() == fits[i]);
    CHECK(checks[i].remedy.empty() == fits[i]);
  }
  CHECK(checks[2].needed == "zvfh");
  // without a runtime, nothing is said of one
  CHECK(Bundle::open(files.path()).machine_checks("").size() == 3);
}
