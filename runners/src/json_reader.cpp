#include "json_reader.h"

#include <new>
#include <set>
#include <utility>

#include "nanochat_x/error.h"
#include "text.h"

namespace nanochat_x::internal {

using nlohmann::json;

namespace {

constexpr int kMaxDepth = 32;

/// Watches the parser: refuses depth (before memory goes into it) and keys that come twice.
class Guard {
 public:
  bool operator()(int depth, json::parse_event_t event, const json& parsed) {
    switch (event) {
      case json::parse_event_t::object_start:
        keys_.emplace_back();
        check_depth(depth);
        break;
      case json::parse_event_t::array_start:
        check_depth(depth);
        break;
      case json::parse_event_t::object_end:
        keys_.pop_back();
        break;
      case json::parse_event_t::key: {
        const auto& key = parsed.get_ref<const std::string&>();
        if (!keys_.back().insert(key).second) throw Error("has the key " + in_quotes(key) + " twice");
        break;
      }
      default:
        break;
    }
    return true;
  }

 private:
  static void check_depth(int depth) {
    if (depth >= kMaxDepth) throw Error("nests deeper than " + std::to_string(kMaxDepth));
  }

  std::vector<std::set<std::string>> keys_;
};

const char* type_name(const json& value) {
  if (value.is_number_float()) return "a number with a fraction or too large";
  if (value.is_number()) return "an integer";
  if (value.is_null()) return "null";
  return value.type_name();
}

}  // namespace

json parse_json(std::string_view text, const std::string& where, const std::string& remedy) {
  Guard guard;
  // The parser copies its callback, so it gets one that refers to the guard.
  const auto callback = [&guard](int depth, json::parse_event_t event, json& parsed) {
    return guard(depth, event, parsed);
  };
  try {
    return json::parse(text.begin(), text.end(), callback);
  } catch (const json::parse_error& error) {
    throw Error(where + ": is not valid JSON (at byte " + std::to_string(error.byte) + "); " + remedy);
  } catch (const json::exception&) {  // a number that no double holds
    throw Error(where + ": has a number that is out of range; " + remedy);
  } catch (const std::bad_alloc&) {
    throw Error(where + ": takes more memory than there is; " + remedy);
  } catch (const Error& error) {
    throw Error(where + ": " + error.what() + "; " + remedy);
  }
}

ObjectReader::ObjectReader(const json& value, std::string where, std::string remedy, std::string key)
    : value_(&value), where_(std::move(where)), remedy_(std::move(remedy)), key_(std::move(key)) {
  if (!value.is_object()) fail("", std::string("must be an object, not ") + type_name(value));
}

void ObjectReader::fail(const std::string& key, const std::string& what) const {
  std::string place = key_;
  if (!key.empty()) place += (place.empty() ? "" : ".") + key;
  throw Error(where_ + ": " + (place.empty() ? "" : printable(place) + ": ") + what + "; " + remedy_);
}

const json& ObjectReader::at(const std::string& key) const {
  const auto found = value_->find(key);
  if (found == value_->end()) fail(key, "is missing");
  return *found;
}

std::string ObjectReader::string(const std::string& key) const {
  const json& value = at(key);
  if (!value.is_string()) fail(key, std::string("must be a string, not ") + type_name(value));
  return value.get<std::string>();
}

std::int64_t ObjectReader::integer(const std::string& key, std::int64_t least, std::int64_t most) const {
  const json& value = at(key);
  if (!value.is_number_integer()) fail(key, std::string("must be an integer, not ") + type_name(value));
  const bool too_large =
      value.is_number_unsigned() &&
      value.get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  if (too_large || value.get<std::int64_t>() < least || value.get<std::int64_t>() > most) {
    fail(key, "is " + value.dump() + ", not within " + std::to_string(least) + " to " + std::to_string(most));
  }
  return value.get<std::int64_t>();
}

ObjectReader ObjectReader::object(const std::string& key) const {
  return ObjectReader(at(key), where_, remedy_, key_.empty() ? key : key_ + "." + key);
}

const json& ObjectReader::array(const std::string& key) const {
  const json& value = at(key);
  if (!value.is_array()) fail(key, std::string("must be an array, not ") + type_name(value));
  return value;
}

std::vector<std::string> ObjectReader::strings(const std::string& key) const {
  std::vector<std::string> result;
  for (const json& value : array(key)) {
    if (!value.is_string()) fail(key, std::string("must hold strings alone, not ") + type_name(value));
    result.push_back(value.get<std::string>());
  }
  return result;
}

std::vector<std::string> ObjectReader::keys() const {
  std::vector<std::string> result;
  for (const auto& item : value_->items()) result.push_back(item.key());
  return result;
}

}  // namespace nanochat_x::internal
