#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <system_error>

#include "nanochat_x/error.h"
#include "nanochat_x/safetensors.h"
#include "safetensors_format.h"
#include "text.h"

namespace nanochat_x {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kBlock = std::size_t{1} << 24U;  // bytes between two looks at the interrupt

/// A new file beside its target: renamed onto it by `commit`, removed if that never comes.
class PendingFile {
 public:
  explicit PendingFile(const fs::path& target) : target_(target), temporary_(target) {
    std::random_device random;
    temporary_ += ".tmp-" + std::to_string(random()) + std::to_string(random());
    stream_.open(temporary_, std::ios::binary | std::ios::trunc);
    if (!stream_) fail("cannot be written; look at the folder's existence and permissions");
    created_ = true;
  }
  ~PendingFile() {
    if (!created_) return;
    stream_.close();
    std::error_code ignored;
    fs::remove(temporary_, ignored);
  }
  PendingFile(const PendingFile&) = delete;
  PendingFile& operator=(const PendingFile&) = delete;

  void write(std::string_view bytes) {
    stream_.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    if (!stream_) fail("cannot be written; is the disk full?");
  }

  void commit() {
    stream_.close();
    if (!stream_) fail("cannot be written; is the disk full?");
    std::error_code error;
    fs::rename(temporary_, target_, error);
    if (error) fail("cannot be written (" + error.message() + ")");
    created_ = false;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const { throw Error(internal::display(target_) + ": " + what); }

  fs::path target_, temporary_;
  std::ofstream stream_;
  bool created_ = false;
};

void check(const TensorToWrite& tensor, std::set<std::string>& names, const std::string& where) {
  const auto fail = [&](const std::string& what) {
    throw Error(where + ": tensor " + internal::in_quotes(tensor.name) + " cannot be written, " + what);
  };
  if (tensor.name == internal::kSafetensorsMetadata) fail("that name is reserved");
  if (!names.insert(tensor.name).second) fail("there are two of that name");
  const auto element = internal::element_bytes(tensor.dtype);
  if (!element) fail("its dtype " + internal::in_quotes(tensor.dtype) + " is unknown");
  const auto bytes = internal::tensor_bytes(tensor.shape, *element);
  if (!bytes || *bytes != tensor.data.size()) {
    fail("it has " + std::to_string(tensor.data.size()) + " bytes, which is not what dtype and shape need");
  }
}

/// Length and JSON, padded with spaces so that the data behind it is aligned.
std::string make_header(const std::vector<const TensorToWrite*>& tensors, const std::string& where) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  std::uint64_t offset = 0;
  for (const TensorToWrite* tensor : tensors) {
    const std::uint64_t end = offset + tensor->data.size();
    header[tensor->name] = {{"dtype", tensor->dtype}, {"shape", tensor->shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception&) {
    throw Error(where + ": cannot be written, a tensor's name is not UTF-8");
  }
  text.append((8 - text.size() % 8) % 8, ' ');
  if (text.size() > internal::kMaxSafetensorsHeader) {
    throw Error(where + ": cannot be written, the header of that many tensors exceeds the format's 100 MB");
  }
  std::string out;
  for (unsigned i = 0; i < 8; ++i) out += static_cast<char>(static_cast<std::uint64_t>(text.size()) >> (8 * i) & 0xff);
  return out + text;
}

/// The file that a link names is what is replaced, not the link; a device must not become a file.
fs::path resolve(const fs::path& file) {
  std::error_code error;
  const fs::file_status status = fs::status(file, error);
  if (!fs::exists(status)) return file;
  if (!fs::is_regular_file(status))
    throw Error(internal::display(file) + ": is no file; give another name to write to");
  fs::path real = fs::canonical(file, error);
  return error ? file : real;
}

}  // namespace

bool write_safetensors(const fs::path& file, std::span<const TensorToWrite> tensors,
                       const std::atomic<bool>* interrupt) {
  const std::string where = internal::display(file);
  std::set<std::string> names;
  std::vector<const TensorToWrite*> order;
  for (const TensorToWrite& tensor : tensors) {
    check(tensor, names, where);
    order.push_back(&tensor);
  }
  // Widest elements first keeps every tensor aligned without gaps, which the format forbids.
  std::stable_sort(order.begin(), order.end(), [](const TensorToWrite* a, const TensorToWrite* b) {
    return *internal::element_bytes(a->dtype) > *internal::element_bytes(b->dtype);
  });
  const std::string header = make_header(order, where);
  PendingFile pending(resolve(file));
  pending.write(header);
  for (const TensorToWrite* tensor : order) {
    std::string_view bytes(reinterpret_cast<const char*>(tensor->data.data()), tensor->data.size());
    for (; !bytes.empty(); bytes.remove_prefix(std::min(bytes.size(), kBlock))) {
      if (interrupt && interrupt->load()) return false;
      pending.write(bytes.substr(0, kBlock));
    }
  }
  if (interrupt && interrupt->load()) return false;
  pending.commit();
  return true;
}

}  // namespace nanochat_x
