#include <doctest/doctest.h>

#if defined(__linux__)
#include <sys/resource.h>

#include <csignal>
#endif

#include <array>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "error_of.h"
#include "nanochat_x/safetensors.h"
#include "temp_dir.h"

using namespace nanochat_x;
using namespace nanochat_x::test;
namespace fs = std::filesystem;

namespace {

std::string little_endian(std::uint64_t value) {
  std::string out;
  for (int i = 0; i < 8; ++i) out += static_cast<char>(value >> (8 * i) & 0xff);
  return out;
}

/// A file of the format, put together by hand.
std::string file_of(const std::string& header, const std::string& data) {
  return little_endian(header.size()) + header + data;
}

/// The header padded with spaces to a multiple of 8, as writers do.
std::string padded(std::string header) {
  while (header.size() % 8 != 0) header += ' ';
  return header;
}

std::string open_error(const std::string& bytes) {
  const TempDir dir;
  write_file(dir / "x.safetensors", bytes);
  return error_of([&] { SafetensorsFile::open(dir / "x.safetensors"); });
}

std::string header_error(const std::string& header, std::size_t data_bytes = 8) {
  return open_error(file_of(padded(header), std::string(data_bytes, 'd')));
}

template <typename T, std::size_t N>
std::span<const std::byte> bytes_of(const std::array<T, N>& values) {
  return std::as_bytes(std::span(values));
}

std::set<fs::path> names_in(const fs::path& folder) {
  std::set<fs::path> names;
  for (const auto& entry : fs::directory_iterator(folder)) names.insert(entry.path().filename());
  return names;
}

}  // namespace

TEST_CASE("a file put together by hand is read") {
  const TempDir dir;
  const std::string header = padded(R"({"__metadata__":{"format":"pt"},)"
                                    R"("b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},)"
                                    R"("a":{"dtype":"I64","shape":[1,1],"data_offsets":[0,8]},)"
                                    R"("empty":{"dtype":"F32","shape":[0,3],"data_offsets":[16,16]},)"
                                    R"("scalar":{"dtype":"U8","shape":[],"data_offsets":[16,17]}})");
  std::string floats(8, '\0');
  const std::array<float, 2> values{1.5F, -2.0F};
  std::memcpy(floats.data(), values.data(), 8);
  write_file(dir / "x", file_of(header, little_endian(513) + floats + '\x07'));

  const SafetensorsFile file = SafetensorsFile::open(dir / "x");
  CHECK(file.tensors().size() == 4);
  const TensorView& a = file.at("a");
  CHECK(a.dtype == "I64");
  CHECK(a.shape == std::vector<std::int64_t>{1, 1});
  REQUIRE(a.data.size() == 8);
  CHECK(*reinterpret_cast<const std::int64_t*>(a.data.data()) == 513);
  const TensorView& b = file.at("b");
  REQUIRE(b.data.size() == 8);
  CHECK(reinterpret_cast<const float*>(b.data.data())[1] == -2.0F);
  CHECK(file.at("empty").data.empty());
  CHECK(file.at("scalar").shape.empty());
  CHECK(file.at("scalar").data[0] == std::byte{7});
  CHECK(contains(error_of([&] { (void)file.at("c"); }), "has no tensor \"c\""));
}

TEST_CASE("the views outlive the object that was opened, through its copies") {
  const TempDir dir;
  write_file(dir / "x", file_of(padded(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})"), "hi"));
  SafetensorsFile copy = SafetensorsFile::open(dir / "x");
  {
    const SafetensorsFile first = SafetensorsFile::open(dir / "x");
    copy = first;
  }
  CHECK(copy.at("a").data[1] == std::byte{'i'});
}

TEST_CASE("a file without tensors") {
  const TempDir dir;
  write_file(dir / "x", file_of("{}", ""));
  CHECK(SafetensorsFile::open(dir / "x").tensors().empty());
}

TEST_CASE("what is no safetensors file") {
  CHECK(contains(open_error(""), "has fewer than 8 bytes"));
  CHECK(contains(open_error("1234567"), "has fewer than 8 bytes"));
  CHECK(contains(open_error(little_endian(0)), "its header is no JSON object"));
  CHECK(contains(open_error(little_endian(3) + "{}"), "ends within its header"));
  CHECK(contains(open_error(little_endian(100'000'001) + "{}"), "its header would have 100000001 bytes"));
  CHECK(contains(open_error(little_endian(~std::uint64_t{0}) + "{}"), "its header would have 18446744073709551615"));
  CHECK(contains(open_error(file_of(" {}", "")), "its header is no JSON object"));
  CHECK(contains(open_error(file_of("[]", "")), "its header is no JSON object"));
  CHECK(contains(open_error(file_of("{", "")), "is not valid JSON"));
  CHECK(contains(open_error(file_of("{}x", "")), "is not valid JSON"));
  CHECK(contains(open_error(file_of("{\"\xff\":1}", "")), "is not valid JSON"));
  std::string deep;
  for (int i = 0; i < 1'000'000; ++i) deep += "{\"a\":";
  CHECK(contains(open_error(file_of(deep, "")), "nests deeper than 32"));
  const TempDir dir;
  CHECK(contains(error_of([&] { SafetensorsFile::open(dir / "none"); }), "none: cannot be opened"));
  CHECK(contains(error_of([&] { SafetensorsFile::open(dir.path()); }), "is no file"));
}

TEST_CASE("headers that are not as the format says") {
  const auto entry = [](const std::string& body) { return header_error("{\"t\":" + body + "}"); };
  CHECK(contains(entry("7"), "t: must be an object"));
  CHECK(contains(entry(R"({"shape":[8],"data_offsets":[0,8]})"), "t.dtype: is missing"));
  CHECK(contains(entry(R"({"dtype":"U8","data_offsets":[0,8]})"), "t.shape: is missing"));
  CHECK(contains(entry(R"({"dtype":"U8","shape":[8]})"), "t.data_offsets: is missing"));
  CHECK(contains(entry(R"({"dtype":"F33","shape":[8],"data_offsets":[0,8]})"), "t.dtype: \"F33\" is unknown"));
  CHECK(contains(entry(R"({"dtype":"U8","shape":8,"data_offsets":[0,8]})"), "t.shape: must be an array"));
  for (const char* shape : {"[-1]", "[1.0]", "[\"8\"]", "[9223372036854775808]", "[1e3]", "[true]"}) {
    CAPTURE(shape);
    CHECK(contains(entry(std::string(R"({"dtype":"U8","data_offsets":[0,8],"shape":)") + shape + "}"),
                   "t.shape: must hold integers from 0 to 2^62 alone"));
  }
  CHECK(
      contains(entry(R"({"dtype":"U8","shape":[8],"data_offsets":[0,4,8]})"), "t.data_offsets: must be [begin, end]"));
  CHECK(contains(entry(R"({"dtype":"U8","shape":[8],"data_offsets":[8,0]})"), "t.data_offsets: must be [begin, end]"));
  CHECK(contains(entry(R"({"dtype":"F32","shape":[8],"data_offsets":[0,8]})"),
                 "give 8 bytes, but dtype and shape need 32"));
  // 2^32 x 2^32 x 1 byte is 0 modulo 2^64
  CHECK(contains(entry(R"({"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]})"),
                 "more than any file has"));
  CHECK(contains(header_error(R"({"__metadata__":{"a":1}})"), "__metadata__.a: must be a string"));
  CHECK(contains(header_error(R"({"__metadata__":[]})"), "__metadata__: must be an object"));
  const std::string t = R"("t":{"dtype":"U8","shape":[8],"data_offsets":[0,8]})";
  CHECK(contains(header_error("{" + t + "," + t + "}"), "has the key \"t\" twice"));
}

TEST_CASE("ranges with a hole, an overlap or too long") {
  const auto two = [](const char* first, const char* second, std::size_t data_bytes) {
    return header_error(std::string(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)") + first +
                            R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + second + "}}",
                        data_bytes);
  };
  CHECK(two("[0,4]", "[4,8]", 8) == "");
  CHECK(two("[4,8]", "[0,4]", 8) == "");
  CHECK(contains(two("[0,4]", "[5,9]", 9), "the data of \"b\" begins at 5, not at 4"));
  CHECK(contains(two("[1,5]", "[5,9]", 9), "the data of \"a\" begins at 1, not at 0"));
  CHECK(contains(two("[0,4]", "[3,7]", 7), "the data of \"b\" begins at 3, not at 4"));
  CHECK(contains(two("[0,4]", "[0,4]", 4), "the data of \"b\" begins at 0, not at 4"));
  CHECK(contains(two("[0,4]", "[4,8]", 7), "has 7 bytes of data, but its tensors take 8"));
  CHECK(contains(two("[0,4]", "[4,8]", 9), "has 9 bytes of data, but its tensors take 8"));
  CHECK(contains(header_error("{}", 1), "has 1 bytes of data, but its tensors take 0"));
}

TEST_CASE("data that is not aligned to its elements") {
  std::string header = padded(R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})");
  CHECK(open_error(file_of(header, std::string(8, 'd'))) == "");
  CHECK(open_error(file_of(header + "    ", std::string(8, 'd'))) == "");  // aligned to 4 is enough for F32
  CHECK(contains(open_error(file_of(header + " ", std::string(8, 'd'))), "\"t\" is not aligned to its elements"));
  header = padded(
      R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"BF16","shape":[1],"data_offsets":[1,3]}})");
  CHECK(contains(open_error(file_of(header, "ddd")), "\"t\" is not aligned to its elements"));
}

TEST_CASE("what is written has the bytes that the format says") {
  const TempDir dir;
  const std::array<float, 2> values{1.0F, 2.0F};
  const TensorToWrite tensor{"t", "F32", {1, 2}, bytes_of(values)};
  write_safetensors(dir / "x", std::span(&tensor, 1));
  std::string data(8, '\0');
  std::memcpy(data.data(), values.data(), 8);
  CHECK(read_file(dir / "x") == file_of(padded(R"({"t":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}})"), data));
  CHECK(names_in(dir.path()) == std::set<fs::path>{"x"});
}

TEST_CASE("what is written can be read") {
  const TempDir dir;
  const std::array<std::uint8_t, 3> small{1, 2, 3};
  const std::array<std::int64_t, 2> large{-1, 1LL << 40};
  const std::vector<TensorToWrite> tensors{{"small \"\n\u00e9", "U8", {3}, bytes_of(small)},
                                           {"large", "I64", {2, 1}, bytes_of(large)},
                                           {"empty", "F16", {0}, {}}};
  write_safetensors(dir / "x", tensors);
  const SafetensorsFile file = SafetensorsFile::open(dir / "x");
  REQUIRE(file.tensors().size() == 3);
  CHECK(file.at("small \"\n\u00e9").data[2] == std::byte{3});
  CHECK(reinterpret_cast<const std::int64_t*>(file.at("large").data.data())[1] == 1LL << 40);
  CHECK(file.at("large").shape == std::vector<std::int64_t>{2, 1});
  write_safetensors(dir / "x", {});
  CHECK(SafetensorsFile::open(dir / "x").tensors().empty());
}

TEST_CASE("what cannot be written leaves nothing behind and the old file as it was") {
  const TempDir dir;
  write_file(dir / "x", "old");
  const std::array<std::uint8_t, 4> data{};
  const auto error = [&](const std::vector<TensorToWrite>& tensors, const fs::path& file) {
    return error_of([&] { write_safetensors(file, tensors); });
  };
  const TensorToWrite good{"t", "U8", {4}, bytes_of(data)};
  CHECK(contains(error({good, good}, dir / "x"), "there are two of that name"));
  CHECK(contains(error({{"__metadata__", "U8", {4}, bytes_of(data)}}, dir / "x"), "that name is reserved"));
  CHECK(contains(error({{"t", "U9", {4}, bytes_of(data)}}, dir / "x"), "its dtype \"U9\" is unknown"));
  CHECK(contains(error({{"t", "U8", {5}, bytes_of(data)}}, dir / "x"), "it has 4 bytes"));
  CHECK(contains(error({{"t", "U8", {-4}, bytes_of(data)}}, dir / "x"), "it has 4 bytes"));
  CHECK(contains(error({{"\xff", "U8", {4}, bytes_of(data)}}, dir / "x"), "a tensor's name is not UTF-8"));
  CHECK(contains(error({good}, dir / "none" / "x"), "cannot be written; look at the folder"));
  fs::create_directory(dir / "folder");
  CHECK(contains(error({good}, dir / "folder"), "folder: is no file"));
  CHECK(read_file(dir / "x") == "old");
  CHECK(names_in(dir.path()) == std::set<fs::path>{"x", "folder"});
}

#if defined(__linux__)
TEST_CASE("a write that fails midway removes its temporary file") {
  const TempDir dir;
  const std::vector<std::byte> data(1 << 20);
  const TensorToWrite tensor{"t", "U8", {1 << 20}, data};
  // As on a full disk: a write past this size fails (with SIGXFSZ ignored, by EFBIG).
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
  const rlimit small{64 << 10, before.rlim_max};
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  REQUIRE(setrlimit(RLIMIT_FSIZE, &small) == 0);
  const std::string error = error_of([&] { write_safetensors(dir / "x", std::span(&tensor, 1)); });
  REQUIRE(setrlimit(RLIMIT_FSIZE, &before) == 0);
  std::signal(SIGXFSZ, old_handler);
  CHECK(contains(error, "x: cannot be written; is the disk full?"));
  CHECK(names_in(dir.path()).empty());
}

TEST_CASE("an interrupted write leaves nothing, and what was there before") {
  TempDir dir;
  write_file(dir / "x", "old");
  const std::vector<float> values(5);
  const TensorToWrite tensor{"a", "F32", {5}, std::as_bytes(std::span(values))};
  std::atomic<bool> interrupt = true;
  CHECK_FALSE(write_safetensors(dir / "x", std::span(&tensor, 1), &interrupt));
  CHECK(read_file(dir / "x") == "old");
  CHECK(std::distance(std::filesystem::directory_iterator(dir.path()), {}) == 1);
  interrupt = false;
  CHECK(write_safetensors(dir / "x", std::span(&tensor, 1), &interrupt));
  CHECK(SafetensorsFile::open(dir / "x").at("a").shape == std::vector<std::int64_t>{5});
}

TEST_CASE("a link is written through, a device is left alone") {
  const TempDir dir;
  const std::array<std::uint8_t, 1> data{9};
  const TensorToWrite tensor{"t", "U8", {1}, bytes_of(data)};
  write_file(dir / "real", "old");
  fs::create_symlink("real", dir / "link");
  write_safetensors(dir / "link", std::span(&tensor, 1));
  CHECK(fs::is_symlink(dir / "link"));
  CHECK(SafetensorsFile::open(dir / "real").at("t").data[0] == std::byte{9});
  CHECK(contains(error_of([&] { write_safetensors("/dev/null", std::span(&tensor, 1)); }), "/dev/null: is no file"));
}
#endif
