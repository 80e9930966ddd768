#include "nanochat_x/recomputing_backend.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace nanochat_x {
namespace {

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

// The ids of `rows` sequences, `capacity` places each.
class TokenCache final : public Cache {
 public:
  TokenCache(std::int64_t rows, std::int64_t capacity)
      : rows_(rows), capacity_(capacity), ids_(index(rows * capacity), 0) {}

  std::int64_t rows() const override { return rows_; }
  std::int64_t capacity() const override { return capacity_; }
  std::unique_ptr<Cache> copy(std::span<const std::int64_t> source, std::int64_t length,
                              std::int64_t capacity) const override {
    auto result = std::make_unique<TokenCache>(std::ssize(source), capacity);
    for (std::int64_t r = 0; r < result->rows_; ++r) {
      std::ranges::copy(row(source[index(r)], length), result->ids_.begin() + r * capacity);
    }
    return result;
  }

  std::span<const std::int64_t> row(std::int64_t row, std::int64_t length) const {
    return std::span(ids_).subspan(index(row * capacity_), index(length));
  }
  void write(std::int64_t row, std::int64_t position, std::span<const std::int64_t> ids) {
    std::ranges::copy(ids, ids_.begin() + row * capacity_ + position);
  }

 private:
  std::int64_t rows_, capacity_;
  std::vector<std::int64_t> ids_;
};

}  // namespace

RecomputingBackend::RecomputingBackend(std::unique_ptr<Backend> backend, const Manifest& manifest)
    : backend_(std::move(backend)), vocab_size_(manifest.vocab_size) {}

Logits RecomputingBackend::forward(std::span<const std::int64_t> ids, std::int64_t batch, std::int64_t length) {
  return backend_->forward(ids, batch, length);
}

Logits RecomputingBackend::step(const Step& step, Cache& cache) {
  auto& tokens = static_cast<TokenCache&>(cache);
  const std::int64_t total = std::ranges::max(step.position) + step.length;
  // A shorter row is padded behind its end, where nothing that comes before can see it.
  std::vector<std::int64_t> ids(index(step.batch * total), 0);
  for (std::int64_t b = 0; b < step.batch; ++b) {
    const std::int64_t position = step.position[index(b)];
    tokens.write(b, position, step.input_ids.subspan(index(b * step.length), index(step.length)));
    std::ranges::copy(tokens.row(b, position + step.length), ids.begin() + b * total);
  }
  Logits all = backend_->forward(ids, step.batch, total);
  const auto kept = std::ssize(step.logits_to_keep);
  if (step.batch == 1 && kept == step.length) {
    all.data = all.data.last(index(kept * vocab_size_));
    all.length = kept;
    return all;
  }
  const auto wanted = std::make_shared<std::vector<float>>();
  wanted->reserve(index(step.batch * kept * vocab_size_));
  for (std::int64_t b = 0; b < step.batch; ++b) {
    for (const std::int64_t column : step.logits_to_keep) {
      const auto row = all.at(b, step.position[index(b)] + column);
      wanted->insert(wanted->end(), row.begin(), row.end());
    }
  }
  return {.data = *wanted, .batch = step.batch, .length = kept, .vocab = vocab_size_, .owner = wanted};
}

std::unique_ptr<Cache> RecomputingBackend::new_cache(std::int64_t rows, std::int64_t capacity) {
  return std::make_unique<TokenCache>(rows, capacity);
}

}  // namespace nanochat_x
