#pragma once

#include <string>
#include <string_view>

namespace nanochat_x::internal {

/// Operating system and architecture that this program was built for, by the manifest's names ("linux", "x86_64").
std::string platform_name();
std::string architecture_name();

/// A manifest's name in the form of the two above: "amd64" is "x86_64", "arm64" is "aarch64", "win32" is "windows".
std::string canonical_platform(std::string_view name);
std::string canonical_architecture(std::string_view name);

/// "2.13" of "2.13.0+cpu".
std::string_view major_minor(std::string_view version);
/// True if `version` comes before `other`: their numbers compared one by one ("1.9" before "1.10.2"; "2.13" is
/// "2.13.0"), whatever follows the numbers left aside. Nothing comes before "".
bool is_older(std::string_view version, std::string_view other);

/// What would lower for this machine's CPU, given the command that lowers: its --march, or lowering here.
std::string march_remedy(const std::string& lower_command);

}  // namespace nanochat_x::internal
