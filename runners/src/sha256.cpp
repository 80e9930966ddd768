#include <openssl/evp.h>

#include <array>
#include <cstddef>
#include <fstream>
#include <memory>
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

}  // namespace

std::string sha256_file(const std::filesystem::path& file) {
  const auto fail = [&](const char* what) { return Error(internal::display(file) + ": " + what); };
  std::vector<char> block(kBlock);
  std::ifstream stream;
  stream.rdbuf()->pubsetbuf(nullptr, 0);  // the block is the buffer
  stream.open(file, std::ios::binary);
  if (!stream) throw fail("cannot be opened; look at its permissions");

  const std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX*)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
  if (!context || EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) != 1) throw fail("OpenSSL has no SHA-256");
  while (stream) {
    stream.read(block.data(), static_cast<std::streamsize>(block.size()));
    if (stream.bad()) throw fail("cannot be read to its end; look at the disk");
    const auto count = static_cast<std::size_t>(stream.gcount());
    if (EVP_DigestUpdate(context.get(), block.data(), count) != 1) throw fail("OpenSSL could not hash it");
  }
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned size = 0;
  if (EVP_DigestFinal_ex(context.get(), digest.data(), &size) != 1) throw fail("OpenSSL could not hash it");
  return to_hex(digest.data(), size);
}

}  // namespace nanochat_x
