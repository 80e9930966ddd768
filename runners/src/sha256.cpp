#include "sha256.h"

#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <fstream>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "nanochat_x/bundle.h"
#include "nanochat_x/error.h"
#include "text.h"

namespace nanochat_x {

namespace {

// Plain reads, not a mapping: pages of a mapping would count as this process's memory.
constexpr std::size_t kBlock = std::size_t{1} << 20;

std::string to_hex(const unsigned char* bytes, std::size_t size) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  for (std::size_t i = 0; i < size; ++i) {
    out += kHex[bytes[i] >> 4];
    out += kHex[bytes[i] & 15];
  }
  return out;
}

/// One hash in the making; `where` names in errors what is hashed.
class Sha256 {
 public:
  explicit Sha256(std::string where) : where_(std::move(where)), context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1) fail("OpenSSL has no SHA-256");
  }
  void add(const char* bytes, std::size_t count) {
    if (EVP_DigestUpdate(context_.get(), bytes, count) != 1) fail("OpenSSL could not hash it");
  }
  std::string finish() {
    std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
    unsigned size = 0;
    if (EVP_DigestFinal_ex(context_.get(), digest.data(), &size) != 1) fail("OpenSSL could not hash it");
    return to_hex(digest.data(), size);
  }

 private:
  [[noreturn]] void fail(const char* what) const { throw Error(where_ + ": " + what); }

  std::string where_;
  std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX*)> context_;
};

}  // namespace

namespace internal {

std::string sha256_of(std::string_view bytes) {
  Sha256 hash("a text");
  hash.add(bytes.data(), bytes.size());
  return hash.finish();
}

bool is_sha256(std::string_view text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

std::string sha256_file(const std::filesystem::path& file, std::uint64_t offset, std::optional<std::uint64_t> size) {
  const std::string where = display(file);
  std::vector<char> block(kBlock);
  std::ifstream stream;
  stream.rdbuf()->pubsetbuf(nullptr, 0);  // the block is the buffer
  stream.open(file, std::ios::binary);
  if (!stream) throw Error(where + ": cannot be opened; look at its permissions");
  stream.seekg(static_cast<std::streamoff>(offset));
  Sha256 hash(where);
  std::uint64_t rest = size.value_or(std::numeric_limits<std::uint64_t>::max());
  while (stream && rest > 0) {
    stream.read(block.data(), static_cast<std::streamsize>(std::min<std::uint64_t>(rest, block.size())));
    if (stream.bad()) throw Error(where + ": cannot be read to its end; look at the disk");
    const auto count = static_cast<std::size_t>(stream.gcount());
    hash.add(block.data(), count);
    rest -= count;
  }
  return hash.finish();
}

}  // namespace internal

std::string sha256_file(const std::filesystem::path& file) { return internal::sha256_file(file, 0, std::nullopt); }

}  // namespace nanochat_x
