#pragma once

#include <string>
#include <string_view>

namespace nanochat_x::internal {

/// Translates a tokenizer's split pattern (the syntax of tiktoken's Rust engine) to a PCRE2 pattern over shadow bytes
/// (char_class.h) that matches alike. What both engines are not known to read alike is refused.
///
/// Taken: ASCII literals, `\r \n \t`, escaped punctuation, `.`, `^`, `$`, `\p{L} \p{N} \s` and their negations, classes
/// of those and of ranges, `(...)`, `(?:...)`, `(?i:...)`, `(?>...)`, `(?=...)`, `(?!...)`, `|`, and the quantifiers
/// `* + ? {n} {n,} {n,m}`, greedy, lazy and possessive. Throws Error naming the offset of anything else.
std::string translate_split_pattern(std::string_view pattern);

}  // namespace nanochat_x::internal
