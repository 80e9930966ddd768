#pragma once

#include <boost/multiprecision/cpp_int.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <variant>

namespace nanochat_x::internal {

using Integer = boost::multiprecision::cpp_int;

/// `()` and `...`: the values that Python's grammar can form from the calculator's characters beside numbers.
struct EmptyTuple {};
struct Ellipsis {};

/// A value of Python's; what an operation gives where Python raises is nothing (`std::nullopt`), always.
using Value = std::variant<Integer, double, EmptyTuple, Ellipsis>;

enum class Operator { add, subtract, multiply, true_divide, floor_divide };

/// An int or a float literal: digits with at most one '.', at least one digit.
std::optional<Value> parse_number(std::string_view literal);
/// `-value`, or `+value`.
std::optional<Value> apply_sign(const Value& value, bool negative);
std::optional<Value> apply(Operator op, const Value& left, const Value& right);
/// Python's `str(value)`.
std::optional<std::string> to_text(const Value& value);
/// Python's `repr` of a float: the shortest digits that read back as the same number.
std::string float_repr(double value);

}  // namespace nanochat_x::internal
