#pragma once

#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace nanochat_x::internal {

/// Parses untrusted JSON. Throws Error that begins with `where` and ends with `remedy` if the text is not JSON or not
/// UTF-8, nests deeper than 32, or has a key twice in one object.
nlohmann::json parse_json(std::string_view text, const std::string& where, const std::string& remedy);

/// A JSON object that knows its place: every read checks presence and type, and throws Error naming file and key.
class ObjectReader {
 public:
  /// `value` must outlive the reader. `where` is the file, `key` the object's place in it ("" for the whole file).
  /// Throws Error if `value` is no object.
  ObjectReader(const nlohmann::json& value, std::string where, std::string remedy, std::string key = {});

  bool has(const std::string& key) const { return value_->contains(key); }
  const nlohmann::json& at(const std::string& key) const;
  std::string string(const std::string& key) const;
  std::int64_t integer(const std::string& key, std::int64_t least,
                       std::int64_t most = std::numeric_limits<std::int64_t>::max()) const;
  ObjectReader object(const std::string& key) const;
  /// The array at `key`.
  const nlohmann::json& array(const std::string& key) const;
  std::vector<std::string> strings(const std::string& key) const;
  /// Keys of this object, in byte order.
  std::vector<std::string> keys() const;

  /// Throws Error: "where: key: what; remedy".
  [[noreturn]] void fail(const std::string& key, const std::string& what) const;

 private:
  const nlohmann::json* value_;
  std::string where_, remedy_, key_;
};

}  // namespace nanochat_x::internal
