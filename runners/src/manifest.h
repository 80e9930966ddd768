#pragma once

#include <string>
#include <string_view>

#include "nanochat_x/bundle.h"

namespace nanochat_x::internal {

/// The largest schema version that this runner reads.
inline constexpr std::int64_t kSchemaVersion = 3;

/// Throws Error if the text of a manifest.json is none of an object, or of a schema that this runner does not read.
/// Looks at nothing else.
void check_schema_version(std::string_view json, const std::string& where);

/// Reads manifest.json's text (docs/bundle.md): schema version first, then every key, every path's form, and that every
/// file that the manifest uses is listed. Touches no file; `where` names it in errors. Throws Error.
Manifest parse_manifest(std::string_view json, const std::string& where);

}  // namespace nanochat_x::internal
