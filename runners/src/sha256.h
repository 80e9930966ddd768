#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

namespace nanochat_x::internal {

/// Lower-case hex SHA-256 of bytes in memory. Throws Error if OpenSSL has no SHA-256.
std::string sha256_of(std::string_view bytes);

/// 64 lower-case hexadecimal digits.
bool is_sha256(std::string_view text);

/// The same of a file's bytes from `offset` on: of `size`, or of all to its end. Throws Error.
std::string sha256_file(const std::filesystem::path& file, std::uint64_t offset, std::optional<std::uint64_t> size);

}  // namespace nanochat_x::internal
