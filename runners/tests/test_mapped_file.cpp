#include <doctest/doctest.h>

#include <memory>
#include <string>

#include "mapped_file.h"
#include "resident.h"
#include "temp_dir.h"

using namespace nanochat_x::test;
using nanochat_x::internal::MappedFile;
using nanochat_x::internal::read_past_mapping;

namespace {

std::string bytes_of_pages(int pages) {
  std::string text;
  for (int i = 0; i < pages * 4096; ++i) text += static_cast<char>(i / 4096 + i % 251);
  return text;
}

// What is read at `from`; "" if that is refused.
std::string read_at(const std::byte* from, std::size_t size) {
  std::string text(size, '?');
  return read_past_mapping(from, size, text.data()) ? text : "";
}

// Windows' mapped files are not read past: callers read through the mapping.
#if defined(_WIN32)
constexpr bool kReads = false;
#else
constexpr bool kReads = true;
#endif

bool reads() {
  if (!kReads) MESSAGE("skipped: files are not read past their mappings here");
  return kReads;
}

}  // namespace

TEST_CASE("mapped file: where files are not read past their mappings, that is said") {
  const TempDir folder;
  write_file(folder / "a", "abc");
  const MappedFile file(folder / "a");
  CHECK(read_at(file.bytes().data(), 3) == (kReads ? "abc" : ""));
}

TEST_CASE("mapped file: what lies in one is read out of the file, anything else is not") {
  if (!reads()) return;
  const TempDir folder;
  const std::string first = bytes_of_pages(3), second = "0123456789";
  write_file(folder / "first", first);
  write_file(folder / "second", second);
  const MappedFile a(folder / "first");
  auto b = std::make_unique<MappedFile>(folder / "second");
  const std::byte *const at = a.bytes().data(), *const other = b->bytes().data();
  CHECK(read_at(at, first.size()) == first);
  CHECK(read_at(at + 4090, 5000) == first.substr(4090, 5000));
  CHECK(read_at(at + first.size() - 1, 1) == first.substr(first.size() - 1));
  CHECK(read_at(at + first.size() - 1, 2) == "");
  CHECK(read_at(at + 5, first.size()) == "");
  CHECK(read_at(other + 3, 4) == "3456");
  CHECK(read_at(reinterpret_cast<const std::byte*>(second.data()), 4) == "");
  // The file that was mapped, whatever has its name now
  write_file(folder / "new", "abcdefghij");
  std::filesystem::rename(folder / "new", folder / "second");
  CHECK(read_at(other + 3, 4) == "3456");
  b.reset();
  CHECK(read_at(other + 3, 4) == "");
  CHECK(read_at(at + 1, 2) == first.substr(1, 2));
}

TEST_CASE("mapped file: a file that became shorter is refused, not read") {
  if (!reads()) return;
  const TempDir folder;
  write_file(folder / "a", bytes_of_pages(3));
  const MappedFile file(folder / "a");
  std::filesystem::resize_file(folder / "a", 5000);
  CHECK(read_at(file.bytes().data() + 4900, 100) != "");
  CHECK(read_at(file.bytes().data() + 4950, 100) == "");
}

TEST_CASE("mapped file: what is read past the mapping is no memory of the process, what is read through it is") {
  if (!reads()) return;
  const TempDir folder;
  write_file(folder / "a", bytes_of_pages(256));
  const MappedFile file(folder / "a");
  const std::byte* const begin = file.bytes().data();
  if (!resident_bytes(begin)) {
    MESSAGE("skipped: this system does not tell");
    return;
  }
  for (int i = 0; i < 256; i += 8) REQUIRE(read_at(begin + i * 4096, 10) != "");
  CHECK(resident_bytes(begin) == 0);
  volatile std::byte touched = begin[100 * 4096];
  (void)touched;
  CHECK(resident_bytes(begin).value_or(0) >= 4096);
}
