#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "nanochat_x/bundle.h"

namespace nanochat_x {

/// Float32 logits `[batch, length, vocab]` of `length` positions a row, row-major. `owner` keeps alive what `data`
/// points to.
struct Logits {
  std::span<const float> data;
  std::int64_t batch = 0, length = 0, vocab = 0;
  std::shared_ptr<const void> owner;

  /// The `vocab` logits at position t of row b.
  std::span<const float> at(std::int64_t b, std::int64_t t) const {
    return data.subspan(static_cast<std::size_t>((b * length + t) * vocab), static_cast<std::size_t>(vocab));
  }
};

/// KV cache of `rows` sequences with room for `capacity` positions each. What it holds and where is the backend's own.
class Cache {
 public:
  virtual ~Cache() = default;
  virtual std::int64_t rows() const = 0;
  virtual std::int64_t capacity() const = 0;
  /// A new cache of `rows` rows and `capacity` positions whose row r begins with the first `length` positions of row
  /// `source[r]` of this one. Serves growing (capacity), forking (one source for all rows) and dropping rows.
  virtual std::unique_ptr<Cache> copy(std::span<const std::int64_t> source, std::int64_t length,
                                      std::int64_t capacity) const = 0;
};

/// One call of a cached program: T tokens for each of B rows.
struct Step {
  std::span<const std::int64_t> input_ids;       ///< [B, T]
  std::span<const std::int64_t> prev_ids;        ///< [B]: the token before input_ids[:, 0]; ignored at position 0
  std::span<const std::int64_t> position;        ///< [B]: tokens already in each row's cache
  std::span<const std::int64_t> logits_to_keep;  ///< [R]: the columns of input_ids whose logits are wanted, ascending
  std::int64_t batch = 0, length = 0;            ///< B, T
};

/// What a target must do; everything else is the engine's. Arguments have been checked by the caller
/// (ids in range, 1 <= T, 1 <= R <= T, position + T <= capacity <= max_seq_len).
class Backend {
 public:
  virtual ~Backend() = default;
  /// Logits of whole sequences `[B, T]` through the program without a cache.
  virtual Logits forward(std::span<const std::int64_t> ids, std::int64_t batch, std::int64_t length) = 0;
  /// Runs a cached program and appends the new keys and values to `cache` (at position[b] of row b). Returns logits
  /// `[B, R, vocab]`.
  virtual Logits step(const Step& step, Cache& cache) = 0;
  virtual std::unique_ptr<Cache> new_cache(std::int64_t rows, std::int64_t capacity) = 0;
  /// Tokens of a row that a long prompt is fed in one step. More take more memory, and a step cannot be interrupted.
  virtual std::int64_t prefill_chunk() const { return 256; }
};

/// How a model is to be run.
struct BackendOptions {
  int threads = 0;             ///< 0: the runtime's default; another number may hold for the whole process
  std::string device = "cpu";  ///< "cpu" or "cuda"
};

/// Opens the programs of a bundle whose hashes and machine have been checked. Each runner program links exactly one
/// backend, which defines this function and the two below. Throws Error, also for a device that the backend lacks.
std::unique_ptr<Backend> open_backend(const Bundle& bundle, const BackendOptions& options);
/// The target that this program runs ("aoti"), and the version of its runtime ("2.13.0").
std::string backend_name();
std::string backend_version();

}  // namespace nanochat_x
