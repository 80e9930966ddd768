#include "fake_backend.h"

#include <algorithm>
#include <chrono>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace nanochat_x::test {
namespace {

std::uint64_t mix(std::uint64_t x) {
  x ^= x >> 33U;
  x *= 0xff51afd7ed558ccdU;
  x ^= x >> 33U;
  x *= 0xc4ceb9fe1a85ec53U;
  return x ^ (x >> 33U);
}

Logits make_logits(std::vector<float> values, std::int64_t batch, std::int64_t length, std::int64_t vocab) {
  auto owner = std::make_shared<const std::vector<float>>(std::move(values));
  return {.data = *owner, .batch = batch, .length = length, .vocab = vocab, .owner = owner};
}

// The backend may rely on its caller: a broken promise is a bug, no Error.
void promise(bool kept, const char* what) {
  if (!kept) throw std::logic_error(std::string("the contract was broken: ") + what);
}

}  // namespace

class FakeBackend::FakeCache : public Cache {
 public:
  FakeCache(std::int64_t rows, std::int64_t capacity)
      : capacity_(capacity),
        entries_(static_cast<std::size_t>(rows), Row(static_cast<std::size_t>(capacity), kPoison)) {}

  std::int64_t rows() const override { return std::ssize(entries_); }
  std::int64_t capacity() const override { return capacity_; }
  std::unique_ptr<Cache> copy(std::span<const std::int64_t> source, std::int64_t length,
                              std::int64_t capacity) const override {
    promise(length <= capacity_ && length <= capacity, "more is copied than there is room for");
    auto result = std::make_unique<FakeCache>(std::ssize(source), capacity);
    for (std::size_t r = 0; r < source.size(); ++r) {
      const Row& from = entries_.at(static_cast<std::size_t>(source[r]));
      std::copy_n(from.begin(), length, result->entries_[r].begin());  // what lies behind stays poisoned
    }
    return result;
  }

  using Row = std::vector<Entry>;
  Row& row(std::int64_t r) { return entries_.at(static_cast<std::size_t>(r)); }

 private:
  static constexpr Entry kPoison{-7, -7, -7};
  std::int64_t capacity_;
  std::vector<Row> entries_;
};

std::vector<float> FakeBackend::logits_after(std::span<const Entry> history) const {
  std::uint64_t state = 1;
  std::size_t anchors = 0, since = 0;
  for (const Entry& entry : history) {
    state = mix(state ^ static_cast<std::uint64_t>(entry.id + 1));
    state = mix(state ^ static_cast<std::uint64_t>(entry.previous + 1));
    state = mix(state ^ static_cast<std::uint64_t>(entry.position + 1));
    since = entry.id == model_.anchor ? 0 : since + 1;
    if (entry.id == model_.anchor) ++anchors;
  }
  std::vector<float> logits(static_cast<std::size_t>(model_.vocab_size));
  for (std::size_t i = 0; i < logits.size(); ++i) {
    logits[i] = static_cast<float>(mix(state + 0x9e3779b97f4a7c15U * (i + 1)) >> 40U) * 0x1p-23F - 1.0F;
  }
  if (anchors > 0 && !model_.scripts.empty()) {
    const auto& script = model_.scripts[(anchors - 1) % model_.scripts.size()];
    if (since < script.size()) logits.at(static_cast<std::size_t>(script[since])) = 100;
  }
  if (model_.nan_logits) logits[0] = std::numeric_limits<float>::quiet_NaN();
  return logits;
}

Logits FakeBackend::forward(std::span<const std::int64_t> ids, std::int64_t batch, std::int64_t length) {
  promise(batch >= 1 && length >= 1 && std::ssize(ids) == batch * length, "shape of input_ids");
  std::vector<float> values;
  for (std::int64_t b = 0; b < batch; ++b) {
    std::vector<Entry> history;
    std::int64_t previous = -1;
    for (const std::int64_t id : ids.subspan(static_cast<std::size_t>(b * length), static_cast<std::size_t>(length))) {
      history.push_back({id, previous, std::ssize(history)});
      previous = id;
      const auto row = logits_after(history);
      values.insert(values.end(), row.begin(), row.end());
    }
  }
  return make_logits(std::move(values), batch, length, model_.vocab_size);
}

Logits FakeBackend::step(const Step& step, Cache& cache) {
  ++steps;
  tokens += step.batch * step.length;
  lengths.push_back(step.length);
  batches.push_back(step.batch);
  largest_capacity = std::max(largest_capacity, cache.capacity());
  if (steps == model_.fail_at_step) throw RuntimeFailed("the runtime failed");
  std::this_thread::sleep_for(std::chrono::milliseconds(model_.step_ms));
  promise(cache.rows() == step.batch && step.length >= 1, "batch and length");
  promise(std::ssize(step.input_ids) == step.batch * step.length, "shape of input_ids");
  promise(std::ssize(step.prev_ids) == step.batch && std::ssize(step.position) == step.batch, "shape of prev_ids");
  promise(!step.logits_to_keep.empty() && std::ranges::is_sorted(step.logits_to_keep) &&
              step.logits_to_keep.front() >= 0 && step.logits_to_keep.back() < step.length,
          "logits_to_keep");
  for (const std::int64_t id : step.input_ids) promise(id >= 0 && id < model_.vocab_size, "input_ids in range");
  std::vector<float> values;
  for (std::int64_t b = 0; b < step.batch; ++b) {
    const auto at = static_cast<std::size_t>(b);
    auto& row = dynamic_cast<FakeCache&>(cache).row(b);
    std::int64_t position = step.position[at], previous = step.prev_ids[at];
    promise(position >= 0 && position + step.length <= cache.capacity(), "position + T <= capacity");
    promise(previous >= 0 && previous < model_.vocab_size, "prev_ids in range");
    if (position == 0) previous = -1;
    for (std::int64_t t = 0; t < step.length; ++t, ++position) {
      const std::int64_t id = step.input_ids[static_cast<std::size_t>(b * step.length + t)];
      row[static_cast<std::size_t>(position)] = {id, previous, position};
      previous = id;
      if (!std::ranges::binary_search(step.logits_to_keep, t)) continue;
      const auto logits = logits_after(std::span(row).first(static_cast<std::size_t>(position + 1)));
      values.insert(values.end(), logits.begin(), logits.end());
    }
  }
  return make_logits(std::move(values), step.batch, std::ssize(step.logits_to_keep), model_.vocab_size);
}

std::unique_ptr<Cache> FakeBackend::new_cache(std::int64_t rows, std::int64_t capacity) {
  return std::make_unique<FakeCache>(rows, capacity);
}

Manifest fake_manifest(std::int64_t vocab_size, std::int64_t max_seq_len) {
  Manifest manifest;
  manifest.dtype = "float32";
  manifest.n_layer = manifest.n_kv_head = manifest.head_dim = 1;
  manifest.vocab_size = vocab_size;
  manifest.sequence_len = manifest.max_seq_len = max_seq_len;
  return manifest;
}

std::string byte_tokenizer_json() {
  static constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  nlohmann::json tokens = nlohmann::json::array(), special;
  for (unsigned byte = 0; byte < 256; ++byte) {
    tokens.push_back(std::string{kDigits[byte >> 2U], kDigits[(byte & 3U) << 4U], '=', '='});
  }
  int id = 256;
  for (const char* name : {"<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
                           "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"}) {
    special[name] = id++;
  }
  return nlohmann::json{{"version", 1}, {"pattern", "\\s+|\\S+"}, {"tokens", tokens}, {"special_tokens", special}}
      .dump();
}

Tokenizer byte_tokenizer() { return Tokenizer::parse(byte_tokenizer_json(), "the test's tokenizer.json"); }

}  // namespace nanochat_x::test

namespace nanochat_x {

// The program of a test bundle is a JSON file that describes a FakeModel.
std::unique_ptr<Backend> open_backend(const Bundle& bundle, const BackendOptions& options) {
  std::ifstream file(bundle.path_of(bundle.manifest().programs.at("full")));
  const auto json = nlohmann::json::parse(file);
  test::FakeModel model;
  model.vocab_size = bundle.manifest().vocab_size;
  model.anchor = json.value("anchor", model.anchor);
  model.scripts = json.value("scripts", model.scripts);
  model.step_ms = json.value("step_ms", 0) + 0 * options.threads;
  model.fail_at_step = json.value("fail_at_step", 0);
  model.nan_logits = json.value("nan_logits", false);
  return std::make_unique<test::FakeBackend>(std::move(model));
}

std::string backend_name() { return "aoti"; }  // a target that the bundle reader knows
std::string backend_version() { return "2.13.0"; }

}  // namespace nanochat_x
