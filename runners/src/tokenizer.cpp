#include "nanochat_x/tokenizer.h"

#include <fstream>
#include <iterator>
#include <map>
#include <utility>

#include "bpe.h"
#include "nanochat_x/error.h"
#include "nanochat_x/utf8.h"
#include "splitter.h"
#include "text.h"
#include "tokenizer_file.h"

namespace nanochat_x {
namespace {

constexpr std::uintmax_t kMaxFileSize = 256u << 20;  // bytes; nanochat's largest is about 1 MB

std::string read_file(const std::filesystem::path& file) {
  std::error_code error;
  const std::uintmax_t size = std::filesystem::file_size(file, error);
  if (error) throw Error(internal::display(file) + ": cannot be read: " + error.message());
  if (size > kMaxFileSize) throw Error(internal::display(file) + ": is no tokenizer: it is larger than 256 MiB");
  std::ifstream stream(file, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (!stream.is_open() || stream.bad()) throw Error(internal::display(file) + ": cannot be read");
  return text;
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(internal::TokenizerFile file)
      : bpe(std::move(file.tokens)),
        splitter(file.pattern),
        special_ids(std::move(file.special_tokens)),
        byte_counts(std::move(file.token_bytes)),
        special(internal::find_special_tokens(special_ids)),
        special_names(special_ids.size()) {
    for (const auto& [name, id] : special_ids) special_names[static_cast<std::size_t>(id) - bpe.size()] = name;
  }

  internal::Bpe bpe;
  internal::Splitter splitter;
  std::map<std::string, TokenId> special_ids;
  std::vector<std::int64_t> byte_counts;
  SpecialTokens special;
  std::vector<std::string_view> special_names;  // by id, from bpe.size() on; views of the keys of special_ids
};

Tokenizer::Tokenizer(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::load(const std::filesystem::path& file) { return parse(read_file(file), internal::display(file)); }

Tokenizer Tokenizer::parse(std::string_view json, const std::string& where) {
  internal::TokenizerFile file = internal::parse_tokenizer_file(json, where);
  try {
    return Tokenizer(std::make_unique<const Impl>(std::move(file)));
  } catch (const Error& error) {
    throw Error(where + ": " + error.what() + "; lower the checkpoint again");
  }
}

std::int64_t Tokenizer::vocab_size() const {
  return static_cast<std::int64_t>(impl_->bpe.size() + impl_->special_names.size());
}

const SpecialTokens& Tokenizer::special() const { return impl_->special; }

std::optional<TokenId> Tokenizer::special_id(std::string_view name) const {
  const auto found = impl_->special_ids.find(std::string(name));
  if (found == impl_->special_ids.end()) return std::nullopt;
  return found->second;
}

std::vector<TokenId> Tokenizer::encode(std::string_view text) const {
  std::vector<TokenId> ids;
  for (const std::string_view piece : impl_->splitter.split(text)) impl_->bpe.encode(piece, ids);
  return ids;
}

std::string_view Tokenizer::token_bytes(TokenId id) const {
  const std::size_t index = checked_index(id);
  if (index < impl_->bpe.size()) return impl_->bpe.bytes(index);
  return impl_->special_names[index - impl_->bpe.size()];
}

bool Tokenizer::counts_bytes() const { return !impl_->byte_counts.empty(); }

std::int64_t Tokenizer::byte_count(TokenId id) const {
  if (!counts_bytes()) throw Error("this tokenizer does not tell its tokens' bytes (token_bytes)");
  return impl_->byte_counts[checked_index(id)];
}

std::size_t Tokenizer::checked_index(TokenId id) const {
  if (id < 0 || id >= vocab_size()) {
    throw Error("token id " + std::to_string(id) + " is out of range: the tokenizer has " +
                std::to_string(vocab_size()) + " tokens");
  }
  return static_cast<std::size_t>(id);
}

std::string Tokenizer::decode_bytes(std::span<const TokenId> ids) const {
  std::string bytes;
  for (const TokenId id : ids) bytes += token_bytes(id);
  return bytes;
}

std::string Tokenizer::decode(std::span<const TokenId> ids) const { return replace_invalid_utf8(decode_bytes(ids)); }

}  // namespace nanochat_x
