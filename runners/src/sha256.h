#pragma once

#include <string>
#include <string_view>

namespace nanochat_x::internal {

/// Lower-case hex SHA-256 of bytes in memory. Throws Error if OpenSSL has no SHA-256.
std::string sha256_of(std::string_view bytes);

/// 64 lower-case hexadecimal digits.
bool is_sha256(std::string_view text);

}  // namespace nanochat_x::internal
