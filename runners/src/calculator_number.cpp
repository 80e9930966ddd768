#include "calculator_number.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <limits>

namespace nanochat_x::internal {
namespace {

namespace mp = boost::multiprecision;

constexpr std::size_t kMaxIntegerDigits =
    4300;  // Python's sys.int_info.default_max_str_digits, for text to int and back
constexpr int kMantissaBits = std::numeric_limits<double>::digits;
constexpr int kLowestExponent = std::numeric_limits<double>::min_exponent - kMantissaBits;  // of the last bit: -1074

int bit_length(const Integer& positive) { return static_cast<int>(mp::msb(positive)) + 1; }

/// `mantissa * 2^exponent`, rounded once, to nearest and ties to even. The last bits of `mantissa` may be sticky.
std::optional<double> round_to_double(std::uint64_t mantissa, int exponent) {
  int bits = 0;
  while (bits < 64 && mantissa >> bits != 0) ++bits;
  const int drop = std::max({bits - kMantissaBits, kLowestExponent - exponent, 0});
  if (drop > 0) {
    const std::uint64_t half = std::uint64_t{1} << (drop - 1), rest = mantissa & ((half << 1) - 1);
    mantissa >>= drop;
    if (rest > half || (rest == half && (mantissa & 1) != 0)) ++mantissa;
    exponent += drop;
  }
  const double result = std::ldexp(static_cast<double>(mantissa), exponent);  // exact, or beyond the largest
  if (std::isinf(result)) return std::nullopt;
  return result;
}

/// `left / right`, correctly rounded; nothing if it is too large for a float. right != 0.
std::optional<double> divide_exactly(const Integer& left, const Integer& right) {
  const bool negative = (left < 0) != (right < 0);
  if (left == 0) return negative ? -0.0 : 0.0;  // as in Python, 0 / -5 is -0.0
  Integer dividend = mp::abs(left), divisor = mp::abs(right);
  // Scale so that the quotient has two or three bits more than a float (with the remainder's sticky bit: enough to
  // round), but no bit that is below the lowest of all floats by more than two.
  const int scale = std::min(kMantissaBits + 2 - (bit_length(dividend) - bit_length(divisor)), 2 - kLowestExponent);
  if (scale > 0) {
    dividend <<= scale;
  } else {
    divisor <<= -scale;
  }
  Integer quotient, remainder;
  mp::divide_qr(dividend, divisor, quotient, remainder);
  const std::uint64_t sticky = remainder != 0 ? 1 : 0;
  const auto result = round_to_double(static_cast<std::uint64_t>(quotient) | sticky, -scale);
  if (!result) return std::nullopt;
  return negative ? -*result : *result;
}

std::optional<double> to_double(const Integer& value) { return divide_exactly(value, 1); }

/// The float of a literal `digits * 10^exponent`; infinity where it is too large, as in Python.
double float_literal(std::string digits, int exponent) {
  digits.erase(0, std::min(digits.find_first_not_of('0'), digits.size()));
  if (digits.empty()) return 0.0;
  // No float and no half-way point between two has more than 770 significant digits: a 1 stands for all that follow.
  constexpr std::size_t kEnough = 800;
  if (digits.size() > kEnough) {
    const bool rest = digits.find_first_not_of('0', kEnough) != std::string::npos;
    exponent += static_cast<int>(digits.size() - kEnough);
    digits.resize(kEnough);
    if (rest) digits += '1', --exponent;
  }
  const int magnitude = static_cast<int>(digits.size()) + exponent;  // value < 10^magnitude
  if (magnitude > 400) return std::numeric_limits<double>::infinity();
  if (magnitude < -400) return 0.0;
  const Integer power = mp::pow(Integer(10), static_cast<unsigned>(std::abs(exponent))), mantissa(digits);
  const auto value = exponent < 0 ? divide_exactly(mantissa, power) : to_double(mantissa * power);
  return value.value_or(std::numeric_limits<double>::infinity());
}

Integer floor_divide(const Integer& left, const Integer& right) {
  Integer quotient, remainder;
  mp::divide_qr(left, right, quotient, remainder);
  if (remainder != 0 && (remainder < 0) != (right < 0)) --quotient;  // cpp_int rounds to zero
  return quotient;
}

/// Python's `left // right`: the floor of (left - remainder) / right, with the signs that Python gives its zeros.
double floor_divide(double left, double right) {
  const double remainder = std::fmod(left, right);
  double quotient = (left - remainder) / right;
  if (remainder != 0 && (right < 0) != (remainder < 0)) quotient -= 1.0;
  if (quotient == 0) return std::copysign(0.0, left / right);
  const double floor = std::floor(quotient);  // the division may have been inexact: snap to the nearest
  return quotient - floor > 0.5 ? floor + 1.0 : floor;
}

std::optional<Value> apply_to_integers(Operator op, const Integer& left, const Integer& right) {
  switch (op) {
    case Operator::add:
      return Integer(left + right);
    case Operator::subtract:
      return Integer(left - right);
    case Operator::multiply:
      return Integer(left * right);
    case Operator::true_divide:
      if (right == 0) return std::nullopt;
      if (const auto quotient = divide_exactly(left, right)) return *quotient;
      return std::nullopt;
    case Operator::floor_divide:
      if (right == 0) return std::nullopt;
      return floor_divide(left, right);
  }
  return std::nullopt;
}

std::optional<Value> apply_to_floats(Operator op, double left, double right) {
  switch (op) {
    case Operator::add:
      return left + right;
    case Operator::subtract:
      return left - right;
    case Operator::multiply:
      return left * right;
    case Operator::true_divide:
      if (right == 0) return std::nullopt;
      return left / right;
    case Operator::floor_divide:
      if (right == 0) return std::nullopt;
      return floor_divide(left, right);
  }
  return std::nullopt;
}

/// `() * count`: empty whatever the count, but the count must fit Python's size type (64 bits).
std::optional<Value> repeat_empty(const Integer& count) {
  if (count < std::numeric_limits<std::int64_t>::min() || count > std::numeric_limits<std::int64_t>::max()) {
    return std::nullopt;
  }
  return EmptyTuple{};
}

std::optional<double> as_float(const Value& value) {
  if (const auto* number = std::get_if<double>(&value)) return *number;
  if (const auto* integer = std::get_if<Integer>(&value)) return to_double(*integer);
  return std::nullopt;
}

std::optional<std::string> integer_text(const Integer& value) {
  constexpr int kMaxBits = 14285;  // 10^4300 has 14285 bits: a longer number has too many digits
  if (value != 0 && bit_length(mp::abs(value)) > kMaxBits) return std::nullopt;
  std::string text = value.str();
  if (text.size() - (value < 0 ? 1 : 0) > kMaxIntegerDigits) return std::nullopt;
  return text;
}

}  // namespace

std::optional<Value> parse_number(std::string_view literal) {
  const std::size_t point = literal.find('.');
  if (point != std::string_view::npos) {
    const std::string_view fraction = literal.substr(point + 1);
    std::string digits(literal.substr(0, point));
    digits += fraction;
    return float_literal(std::move(digits), -static_cast<int>(fraction.size()));
  }
  const std::size_t first = literal.find_first_not_of('0');
  if (first == std::string_view::npos) return Integer(0);  // "000" too, at any length
  if (first != 0 || literal.size() > kMaxIntegerDigits) return std::nullopt;
  return Integer(std::string(literal));
}

std::optional<Value> apply_sign(const Value& value, bool negative) {
  if (const auto* number = std::get_if<double>(&value)) return negative ? -*number : *number;
  if (const auto* integer = std::get_if<Integer>(&value)) return negative ? Integer(-*integer) : *integer;
  return std::nullopt;
}

std::optional<Value> apply(Operator op, const Value& left, const Value& right) {
  const auto* left_integer = std::get_if<Integer>(&left);
  const auto* right_integer = std::get_if<Integer>(&right);
  if (left_integer && right_integer) return apply_to_integers(op, *left_integer, *right_integer);

  const bool left_empty = std::holds_alternative<EmptyTuple>(left);
  const bool right_empty = std::holds_alternative<EmptyTuple>(right);
  if (op == Operator::add && left_empty && right_empty) return EmptyTuple{};
  if (op == Operator::multiply && left_empty && right_integer) return repeat_empty(*right_integer);
  if (op == Operator::multiply && right_empty && left_integer) return repeat_empty(*left_integer);

  const auto left_float = as_float(left), right_float = as_float(right);
  if (!left_float || !right_float) return std::nullopt;
  return apply_to_floats(op, *left_float, *right_float);
}

std::string float_repr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  std::array<char, 40> buffer{};  // [-]d[.ddd]e[+-]dd
  const auto written =
      std::to_chars(buffer.data(), buffer.data() + buffer.size(), std::abs(value), std::chars_format::scientific);
  const std::string_view shortest(buffer.data(), static_cast<std::size_t>(written.ptr - buffer.data()));
  const std::size_t e = shortest.find('e');
  int exponent = 0;
  const char* exponent_begin = shortest.data() + e + (shortest[e + 1] == '+' ? 2 : 1);
  std::from_chars(exponent_begin, shortest.data() + shortest.size(), exponent);
  std::string digits(shortest.substr(0, e));
  if (digits.size() > 1) digits.erase(1, 1);  // the point

  std::string text = std::signbit(value) ? "-" : "";
  if (exponent < -4 || exponent >= 16) {
    text += digits.substr(0, 1);
    if (digits.size() > 1) text.append(".").append(digits, 1);
    const std::string power = std::to_string(std::abs(exponent));
    return text + (exponent < 0 ? "e-" : "e+") + (power.size() < 2 ? "0" : "") + power;
  }
  if (exponent < 0) return text + "0." + std::string(static_cast<std::size_t>(-exponent - 1), '0') + digits;
  const auto whole = static_cast<std::size_t>(exponent) + 1;
  if (digits.size() <= whole) return text + digits + std::string(whole - digits.size(), '0') + ".0";
  return text + digits.substr(0, whole) + "." + digits.substr(whole);
}

std::optional<std::string> to_text(const Value& value) {
  if (const auto* number = std::get_if<double>(&value)) return float_repr(*number);
  if (const auto* integer = std::get_if<Integer>(&value)) return integer_text(*integer);
  return std::holds_alternative<EmptyTuple>(value) ? "()" : "Ellipsis";
}

}  // namespace nanochat_x::internal
