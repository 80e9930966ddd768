#include "splitter.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <new>
#include <string>

#include "char_class.h"
#include "nanochat_x/error.h"
#include "split_pattern.h"

namespace nanochat_x::internal {
namespace {

// PCRE2 keeps backtracking points on the heap and JIT code on a stack of its own, never on ours: these bound both.
constexpr std::uint32_t kHeapLimitKiB = 256 * 1024;
constexpr std::size_t kJitStackStart = 32 * 1024, kJitStackMax = 1024 * 1024;
constexpr std::uint64_t kMatchLimitBase = 10'000'000, kMatchLimitPerByte = 64;

template <auto Free>
struct Pcre2Free {
  template <typename T>
  void operator()(T* p) const {
    Free(p);
  }
};
using Code = std::unique_ptr<pcre2_code, Pcre2Free<pcre2_code_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, Pcre2Free<pcre2_match_data_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, Pcre2Free<pcre2_match_context_free>>;
using JitStack = std::unique_ptr<pcre2_jit_stack, Pcre2Free<pcre2_jit_stack_free>>;

std::string message_of(int code) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(code, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

/// What one call of `split` needs to run the compiled pattern over one shadow.
class Matcher {
 public:
  Matcher(const pcre2_code* code, std::string_view shadow)
      : code_(code),
        shadow_(shadow),
        data_(pcre2_match_data_create_from_pattern(code, nullptr)),
        context_(pcre2_match_context_create(nullptr)),
        stack_(pcre2_jit_stack_create(kJitStackStart, kJitStackMax, nullptr)) {
    if (!data_ || !context_) throw std::bad_alloc();
    const std::uint64_t limit = kMatchLimitBase + kMatchLimitPerByte * shadow.size();
    pcre2_set_match_limit(context_.get(), static_cast<std::uint32_t>(std::min<std::uint64_t>(
                                              limit, std::numeric_limits<std::uint32_t>::max())));
    pcre2_set_heap_limit(context_.get(), kHeapLimitKiB);
    if (stack_) pcre2_jit_stack_assign(context_.get(), nullptr, stack_.get());
  }

  /// Finds the first match from `start` on; false if there is none.
  bool next(std::size_t start) {
    int found = run(start, 0);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) found = run(start, PCRE2_NO_JIT);
    if (found == PCRE2_ERROR_NOMATCH) return false;
    if (found < 0) {
      throw Error("the text cannot be split by the tokenizer's pattern: " + message_of(found) + " (at character " +
                  std::to_string(start) + ")");
    }
    return true;
  }

  std::size_t begin() const { return pcre2_get_ovector_pointer(data_.get())[0]; }
  std::size_t end() const { return pcre2_get_ovector_pointer(data_.get())[1]; }

 private:
  int run(std::size_t start, std::uint32_t options) {
    return pcre2_match(code_, reinterpret_cast<PCRE2_SPTR>(shadow_.data()), shadow_.size(), start, options, data_.get(),
                       context_.get());
  }

  const pcre2_code* code_;
  std::string_view shadow_;
  MatchData data_;
  MatchContext context_;
  JitStack stack_;
};

/// Where the character after the one at `position` begins, in well-formed UTF-8.
std::size_t next_character(std::string_view text, std::size_t position) {
  ++position;
  while (position < text.size() && (static_cast<unsigned char>(text[position]) & 0xC0) == 0x80) ++position;
  return position;
}

}  // namespace

struct Splitter::Compiled {
  Code code;
};

Splitter::Splitter(std::string_view pattern) {
  const std::string bytes = translate_split_pattern(pattern);
  int error = 0;
  PCRE2_SIZE offset = 0;
  Code code(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(bytes.data()), bytes.size(),
                          PCRE2_NEVER_UTF | PCRE2_NEVER_UCP | PCRE2_NO_AUTO_CAPTURE, &error, &offset, nullptr));
  if (!code) throw Error("the split pattern is malformed: " + message_of(error));
  std::uint32_t matches_empty = 0;
  pcre2_pattern_info(code.get(), PCRE2_INFO_MATCHEMPTY, &matches_empty);
  if (matches_empty != 0) throw Error("the split pattern is not supported: it can match an empty text");
  pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);  // where that is not possible, pcre2_match interprets
  compiled_ = std::make_unique<const Compiled>(Compiled{std::move(code)});
}

Splitter::~Splitter() = default;

std::vector<std::string_view> Splitter::split(std::string_view text) const {
  const std::string shadow = shadow_of(text);
  Matcher matcher(compiled_->code.get(), shadow);
  std::vector<std::string_view> pieces;
  std::size_t character = 0, byte = 0;  // the same place, in the shadow and in the text
  const auto go_to = [&](std::size_t wanted) {
    for (; character < wanted; ++character) byte = next_character(text, byte);
    return byte;
  };
  while (character < shadow.size() && matcher.next(character)) {
    const std::size_t begin = go_to(matcher.begin());
    pieces.push_back(text.substr(begin, go_to(matcher.end()) - begin));
  }
  return pieces;
}

}  // namespace nanochat_x::internal
