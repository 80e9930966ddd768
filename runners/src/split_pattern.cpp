#include "split_pattern.h"

#include <vector>

#include "char_class.h"
#include "nanochat_x/error.h"

namespace nanochat_x::internal {
namespace {

constexpr std::string_view kHex = "0123456789abcdef";
constexpr std::string_view kEscapable = "\\.+*?()|[]{}^$#&-~ /\"'";
constexpr std::size_t kMaxPatternLength = 10'000;
constexpr std::size_t kMaxGroupDepth = 100;

std::string hex_escape(std::size_t byte) { return std::string("\\x") + kHex[byte >> 4] + kHex[byte & 15]; }

std::size_t first_of(const ByteSet& set) {
  std::size_t byte = 0;
  while (byte < set.size() && !set[byte]) ++byte;
  return byte;
}

/// A class that matches exactly the bytes of `set`.
std::string render_set(const ByteSet& set) {
  if (set.none()) return "(?!)";
  if (set.count() == 1) return hex_escape(first_of(set));
  std::string out = "[";
  for (std::size_t first = 0; first < set.size(); ++first) {
    if (!set[first]) continue;
    std::size_t last = first;
    while (last + 1 < set.size() && set[last + 1]) ++last;
    out += hex_escape(first);
    if (last > first) out.append("-").append(hex_escape(last));
    first = last;
  }
  return out + "]";
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// Adds what equals a member when case is ignored (simple folding: U+017F is an s, the Kelvin sign a k).
void fold_case(ByteSet& set) {
  for (std::size_t upper = 'A'; upper <= 'Z'; ++upper) {
    const std::size_t lower = upper + ('a' - 'A');
    if (set[upper] || set[lower]) set[upper] = set[lower] = true;
  }
  if (set['s'] || set[Shadow::long_s]) set['s'] = set['S'] = set[Shadow::long_s] = true;
  if (set['k'] || set[Shadow::kelvin]) set['k'] = set['K'] = set[Shadow::kelvin] = true;
}

class Translator {
 public:
  explicit Translator(std::string_view pattern) : pattern_(pattern) {}

  std::string run() {
    if (pattern_.empty()) refuse("it is empty");
    if (pattern_.size() > kMaxPatternLength) refuse("it is longer than " + std::to_string(kMaxPatternLength));
    while (position_ < pattern_.size()) item();
    if (!groups_.empty()) refuse("a group is not closed");
    return std::move(out_);
  }

 private:
  struct Group {
    bool caseless_outside;
    bool lookahead;
  };

  [[noreturn]] void refuse(const std::string& why) const {
    throw Error("the split pattern is not supported: " + why + " (at offset " + std::to_string(position_) + ")");
  }

  bool at_end() const { return position_ == pattern_.size(); }
  char peek() const { return at_end() ? '\0' : pattern_[position_]; }
  bool take(std::string_view text) {
    if (pattern_.substr(position_, text.size()) != text) return false;
    position_ += text.size();
    return true;
  }

  void item() {
    const char c = peek();
    if (c == '(') return open_group();
    if (c == ')') return close_group();
    if (c == '*' || c == '+' || c == '?' || (c == '{' && is_digit(second()))) return quantifier();
    if (take("|")) return emit("|", false);
    if (take("^")) return emit("\\A", false);
    if (take("$")) return emit("\\z", false);  // of the text alone, not before a last newline
    if (take("[")) return emit_set(bracket_class());
    if (take(".")) return emit_set(~ByteSet().set('\n'));
    if (c == '\\') return emit_set(escape());
    if (c == '{') refuse("\"{\" must be escaped");
    emit_set(literal());
  }

  char second() const { return position_ + 1 < pattern_.size() ? pattern_[position_ + 1] : '\0'; }

  void emit(std::string_view text, bool repeatable) {
    out_ += text;
    repeatable_ = repeatable;
  }
  void emit_set(ByteSet set) {
    if (caseless_) fold_case(set);
    emit(render_set(set), true);
  }

  void open_group() {
    static constexpr std::string_view kOpeners[] = {"(?:", "(?i:", "(?>", "(?=", "(?!", "("};
    if (groups_.size() == kMaxGroupDepth) refuse("groups are nested too deep");
    for (const std::string_view opener : kOpeners) {
      if (opener == "(" && second() == '?') refuse("a group of a kind that is not known");
      if (!take(opener)) continue;
      groups_.push_back({caseless_, opener == "(?=" || opener == "(?!"});
      if (opener == "(?i:") caseless_ = true;
      // what a plain group captured is never used
      return emit(opener == "(" || opener == "(?i:" ? "(?:" : opener, false);
    }
  }

  void close_group() {
    if (groups_.empty()) refuse("\")\" without \"(\"");
    ++position_;
    caseless_ = groups_.back().caseless_outside;
    emit(")", !groups_.back().lookahead);
    groups_.pop_back();
  }

  void quantifier() {
    if (!repeatable_) refuse("a quantifier with nothing to repeat");
    const std::size_t start = position_;
    if (take("{")) {
      count();
      if (take(",") && is_digit(peek())) count();
      if (!take("}")) refuse("a quantifier that is not closed");
    } else {
      ++position_;
    }
    if (peek() == '?' || peek() == '+') ++position_;
    emit(pattern_.substr(start, position_ - start), false);
  }

  void count() {
    const std::size_t start = position_;
    while (is_digit(peek())) ++position_;
    if (position_ - start > 3) refuse("a repeat count above 999");
  }

  /// The character class that an escape stands for.
  ByteSet escape() {
    static constexpr struct {
      std::string_view text;
      CharClass kind;
      bool negated;
    } kClasses[] = {{"\\p{L}", CharClass::letter, false}, {"\\P{L}", CharClass::letter, true},
                    {"\\p{N}", CharClass::number, false}, {"\\P{N}", CharClass::number, true},
                    {"\\s", CharClass::space, false},     {"\\S", CharClass::space, true}};
    for (const auto& known : kClasses) {
      if (pattern_.substr(position_, known.text.size()) != known.text) continue;
      // some characters outside of L and N differ only in case from one inside, which the shadow does not tell
      if (caseless_ && known.kind != CharClass::space) refuse("\\p{...} where case is ignored");
      position_ += known.text.size();
      return known.negated ? ~shadows_of(known.kind) : shadows_of(known.kind);
    }
    return ByteSet().set(static_cast<std::size_t>(escaped_character()));
  }

  char escaped_character() {
    const char c = second();
    const auto taken = [this](char character) {
      position_ += 2;
      return character;
    };
    if (c == 'r') return taken('\r');
    if (c == 'n') return taken('\n');
    if (c == 't') return taken('\t');
    if (c == '\0' || kEscapable.find(c) == std::string_view::npos) refuse("an escape that is not known");
    return taken(c);
  }

  ByteSet literal() {
    const auto byte = static_cast<unsigned char>(peek());
    if (byte >= 0x80) refuse("a character outside of ASCII");
    ++position_;
    return ByteSet().set(byte);
  }

  /// A class in brackets, after its "[".
  ByteSet bracket_class() {
    const bool negated = take("^");
    ByteSet set;
    bool first = true;
    for (; first || peek() != ']'; first = false) {
      if (at_end()) refuse("a class that is not closed");
      if (first && peek() == ']') refuse("\"]\" must be escaped in a class");
      if (peek() == '[') refuse("\"[\" must be escaped in a class");
      if ((peek() == '&' || peek() == '-' || peek() == '~') && second() == peek()) refuse("a set operation in a class");
      set |= class_member();
    }
    ++position_;
    if (caseless_) fold_case(set);  // before negation, as tiktoken's engine does
    return negated ? ~set : set;
  }

  ByteSet class_member() {
    const ByteSet low = peek() == '\\' ? escape() : literal();
    if (peek() != '-' || second() == ']') return low;
    ++position_;
    if (at_end()) refuse("a class that is not closed");
    if (peek() == '[' || peek() == '-') refuse("an operator in a class");
    const ByteSet high = peek() == '\\' ? escape() : literal();
    if (low.count() != 1 || high.count() != 1 || first_of(low) > first_of(high)) refuse("a range that is none");
    ByteSet range;
    for (std::size_t byte = first_of(low); byte <= first_of(high); ++byte) range.set(byte);
    return range;
  }

  std::string_view pattern_;
  std::string out_;
  std::size_t position_ = 0;
  bool caseless_ = false;
  bool repeatable_ = false;
  std::vector<Group> groups_;
};

}  // namespace

std::string translate_split_pattern(std::string_view pattern) { return Translator(pattern).run(); }

}  // namespace nanochat_x::internal
