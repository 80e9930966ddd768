#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace nanochat_x::internal {

/// The bytes of RFC 4648 base64 with padding, read strictly: nothing if there is any other character, if the padding is
/// missing, or if unused bits are set.
std::optional<std::string> decode_base64(std::string_view text);

}  // namespace nanochat_x::internal
