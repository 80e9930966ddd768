#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace nanochat_x::internal {

/// The specification's limit for the header, and the name in it that is no tensor.
inline constexpr std::uint64_t kMaxSafetensorsHeader = 100'000'000;
inline constexpr const char* kSafetensorsMetadata = "__metadata__";

/// Bytes of one element of a safetensors dtype; nothing if it is unknown (or packs several elements in a byte).
std::optional<std::uint64_t> element_bytes(std::string_view dtype);

/// Bytes of a tensor; nothing if a dimension is negative or the product overflows.
std::optional<std::uint64_t> tensor_bytes(std::span<const std::int64_t> shape, std::uint64_t element);

}  // namespace nanochat_x::internal
