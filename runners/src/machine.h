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

/// What would lower for this machine's CPU, given the command that lowers: its --march, or lowering here.
std::string march_remedy(const std::string& lower_command);

}  // namespace nanochat_x::internal
