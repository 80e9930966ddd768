#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace nanochat_x::internal {

/// `text` fit for an error's one line: control characters (C1 too) as \xNN, cut after 200 bytes.
std::string printable(std::string_view text);

/// The same, not cut.
std::string without_controls(std::string_view text);

/// `printable(text)` in double quotes.
std::string in_quotes(std::string_view text);

/// A path as UTF-8, fit for an error's one line.
std::string display(const std::filesystem::path& path);

/// A path from UTF-8 bytes (std::filesystem::path(std::string) would take them for the code page on Windows).
std::filesystem::path path_from_utf8(std::string_view text);

}  // namespace nanochat_x::internal
