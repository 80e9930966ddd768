#pragma once

#include <memory>
#include <string_view>
#include <vector>

namespace nanochat_x::internal {

/// Splits text into the pieces that are merged on their own. Immutable: may be used from several threads.
class Splitter {
 public:
  /// Throws Error for a pattern that is malformed, not supported (split_pattern.h), or able to match nothing at all.
  explicit Splitter(std::string_view pattern);
  ~Splitter();

  /// The pieces of `text` in order, as views of it. Text that the pattern does not match is in none of them, as with
  /// tiktoken (nanochat's patterns match all). Throws Error if `text` is not UTF-8, or if the pattern needs more
  /// backtracking on it than a pattern should.
  std::vector<std::string_view> split(std::string_view text) const;

 private:
  struct Compiled;
  std::unique_ptr<const Compiled> compiled_;
};

}  // namespace nanochat_x::internal
