#include "nanochat_x/safetensors.h"

#include <algorithm>
#include <limits>
#include <string_view>
#include <utility>

#include "json_reader.h"
#include "mapped_file.h"
#include "nanochat_x/error.h"
#include "safetensors_format.h"
#include "text.h"

namespace nanochat_x {

using internal::in_quotes;
using nlohmann::json;

namespace internal {

std::optional<std::uint64_t> element_bytes(std::string_view dtype) {
  struct Dtype {
    std::string_view name;
    std::uint64_t bytes;
  };
  static constexpr Dtype kDtypes[] = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"F8_E8M0", 1},
      {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},     {"U32", 4},
      {"F32", 4},  {"I64", 8}, {"U64", 8}, {"F64", 8},     {"C64", 8},
  };
  for (const Dtype& known : kDtypes) {
    if (known.name == dtype) return known.bytes;
  }
  return std::nullopt;
}

std::optional<std::uint64_t> tensor_bytes(std::span<const std::int64_t> shape, std::uint64_t element) {
  constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  std::uint64_t bytes = element;
  bool empty = false;
  for (const std::int64_t size : shape) {
    if (size < 0) return std::nullopt;
    const auto n = static_cast<std::uint64_t>(size);
    if (n == 0) {
      empty = true;
      continue;
    }
    if (bytes > kMost / n) return std::nullopt;
    bytes *= n;
  }
  return empty ? 0 : bytes;
}

}  // namespace internal

namespace {

const std::string kRemedy = "write the file again";  // NOLINT(cert-err58-cpp)

/// A tensor's entry in the header.
struct Entry {
  std::string name;
  TensorView view;
  std::uint64_t begin = 0, end = 0;  // in the data, which begins behind the header
};

std::uint64_t little_endian(std::span<const std::byte> bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = bytes.size(); i-- > 0;) value = value << 8 | std::to_integer<std::uint64_t>(bytes[i]);
  return value;
}

std::string_view header_of(std::span<const std::byte> bytes, const std::string& where) {
  if (bytes.size() < 8) throw Error(where + ": is no safetensors file, it has fewer than 8 bytes; " + kRemedy);
  const std::uint64_t length = little_endian(bytes.first(8));
  if (length > internal::kMaxSafetensorsHeader) {
    throw Error(where + ": is no safetensors file, its header would have " + std::to_string(length) + " bytes; " +
                kRemedy);
  }
  if (length > bytes.size() - 8) throw Error(where + ": ends within its header; " + kRemedy);
  const std::string_view header(reinterpret_cast<const char*>(bytes.data()) + 8, static_cast<std::size_t>(length));
  if (!header.starts_with('{'))
    throw Error(where + ": is no safetensors file, its header is no JSON object; " + kRemedy);
  return header;
}

std::vector<std::int64_t> read_integers(const internal::ObjectReader& tensor, const std::string& key) {
  std::vector<std::int64_t> result;
  for (const json& value : tensor.array(key)) {
    // A non-negative literal that fits is stored as unsigned; everything else is a fault.
    const bool fits = value.is_number_unsigned() && value.get<std::uint64_t>() <= std::uint64_t{1} << 62;
    if (!fits) tensor.fail(key, "must hold integers from 0 to 2^62 alone");
    result.push_back(value.get<std::int64_t>());
  }
  return result;
}

Entry read_entry(const internal::ObjectReader& header, const std::string& name) {
  const internal::ObjectReader tensor = header.object(name);
  Entry entry;
  entry.name = name;
  entry.view.dtype = tensor.string("dtype");
  const auto element = internal::element_bytes(entry.view.dtype);
  if (!element) tensor.fail("dtype", in_quotes(entry.view.dtype) + " is unknown");
  entry.view.shape = read_integers(tensor, "shape");
  const std::vector<std::int64_t> offsets = read_integers(tensor, "data_offsets");
  if (offsets.size() != 2 || offsets[0] > offsets[1]) tensor.fail("data_offsets", "must be [begin, end]");
  entry.begin = static_cast<std::uint64_t>(offsets[0]);
  entry.end = static_cast<std::uint64_t>(offsets[1]);
  const auto bytes = internal::tensor_bytes(entry.view.shape, *element);
  if (!bytes || *bytes != entry.end - entry.begin) {
    tensor.fail("data_offsets", "give " + std::to_string(entry.end - entry.begin) +
                                    " bytes, but dtype and shape need " +
                                    (bytes ? std::to_string(*bytes) : "more than any file has"));
  }
  return entry;
}

std::vector<Entry> read_header(std::string_view text, const std::string& where) {
  const json value = internal::parse_json(text, where, kRemedy);
  const internal::ObjectReader header(value, where, kRemedy);
  std::vector<Entry> entries;
  for (const std::string& name : header.keys()) {
    if (name == internal::kSafetensorsMetadata) {
      const internal::ObjectReader metadata = header.object(name);
      for (const std::string& key : metadata.keys()) (void)metadata.string(key);
    } else {
      entries.push_back(read_entry(header, name));
    }
  }
  return entries;
}

/// The ranges must cover the data without a hole and without an overlap.
void check_ranges(std::vector<Entry>& entries, std::uint64_t data_bytes, const std::string& where) {
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  std::uint64_t expected = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != expected) {
      throw Error(where + ": the data of " + in_quotes(entry.name) + " begins at " + std::to_string(entry.begin) +
                  ", not at " + std::to_string(expected) + " where the tensor before it ends; " + kRemedy);
    }
    expected = entry.end;
  }
  if (expected != data_bytes) {
    throw Error(where + ": has " + std::to_string(data_bytes) + " bytes of data, but its tensors take " +
                std::to_string(expected) + "; " + kRemedy);
  }
}

}  // namespace

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& file) {
  const std::string where = internal::display(file);
  const auto mapping = std::make_shared<const internal::MappedFile>(file);
  const std::string_view header = header_of(mapping->bytes(), where);
  const std::span<const std::byte> data = mapping->bytes().subspan(8 + header.size());
  std::vector<Entry> entries = read_header(header, where);
  check_ranges(entries, data.size(), where);

  SafetensorsFile result;
  result.where_ = where;
  for (Entry& entry : entries) {
    // The mapping begins at a page's start, so the place in the file tells the alignment in memory.
    if ((8 + header.size() + entry.begin) % *internal::element_bytes(entry.view.dtype) != 0) {
      throw Error(where + ": the data of " + in_quotes(entry.name) + " is not aligned to its elements; " + kRemedy +
                  " with a current safetensors library");
    }
    entry.view.data =
        data.subspan(static_cast<std::size_t>(entry.begin), static_cast<std::size_t>(entry.end - entry.begin));
    result.tensors_.emplace(std::move(entry.name), std::move(entry.view));
  }
  result.mapping_ = mapping;
  return result;
}

const TensorView& SafetensorsFile::at(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw Error(where_ + ": has no tensor " + in_quotes(name));
  return found->second;
}

}  // namespace nanochat_x
