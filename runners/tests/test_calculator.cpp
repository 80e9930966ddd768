#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "calculator_number.h"
#include "nanochat_x/calculator.h"

using nanochat_x::calculate;
using namespace std::string_literals;  // GCC 12 warns of "..." + repeat(...) where there is nothing wrong

namespace {

using Table = std::vector<std::pair<std::string, std::string>>;

void check(const Table& table) {
  for (const auto& [expression, expected] : table) {
    CAPTURE(expression);
    CHECK(calculate(expression).value_or("(nothing)") == expected);
  }
}

void check_nothing(const std::vector<std::string>& expressions) {
  for (const auto& expression : expressions) {
    CAPTURE(expression);
    CHECK(calculate(expression).value_or("(nothing)") == "(nothing)");
  }
}

std::string repeat(const std::string& text, int count) {
  std::string out;
  for (int i = 0; i < count; ++i) out += text;
  return out;
}

}  // namespace

// All expected values are what CPython 3.11 prints.
TEST_CASE("integers are exact and of any size") {
  check({{"1+2*3", "7"},
         {"(1+2)*3", "9"},
         {"2-3-4", "-5"},
         {"12,345,678*1,000", "12345678000"},
         {"7//2", "3"},
         {"-7//2", "-4"},
         {"7//-2", "-4"},
         {"-7//-2", "3"},
         {"--5", "5"},
         {"-+-+5", "5"},
         {"2*-3", "-6"},
         {"000", "0"},
         {" 1 + 1 ", "2"},
         {"9999999999*9999999999*9999999999", "999999999700000000029999999999"},
         {"-100000000000000000000//3", "-33333333333333333334"}});
}

TEST_CASE("true division of integers is rounded once") {
  check({{"6/3", "2.0"},
         {"1/3", "0.3333333333333333"},
         {"8/4/2", "1.0"},
         {"0/-5", "-0.0"},
         {"9007199254740993/1", "9007199254740992.0"},
         {"9007199254740995/1", "9007199254740996.0"},
         {"1"s + repeat("0", 400) + "/1"s + repeat("0", 399), "10.0"},
         {"1/1"s + repeat("0", 323), "1e-323"},
         {"2/1"s + repeat("0", 324), "0.0"},
         {"3/1"s + repeat("0", 324), "5e-324"},
         {"-1/1"s + repeat("0", 400), "-0.0"}});
  check_nothing({"1/0", "1//0", "1.0/0", "1.0//0", "0/0", "1"s + repeat("0", 309) + "/1"});
}

TEST_CASE("floats are Python's") {
  check({{"0.1+0.2", "0.30000000000000004"},
         {"1.5*2", "3.0"},
         {"1.", "1.0"},
         {".5", "0.5"},
         {"01.5", "1.5"},
         {"1.0//0.1", "9.0"},
         {"-1.0//3", "-1.0"},
         {"-0.0", "-0.0"},
         {"0.0//-1", "-0.0"},
         {"5//-.0000001", "-50000001.0"},
         {"1"s + repeat("0", 308) + ".*10", "inf"},
         {"-1"s + repeat("0", 400) + ".", "-inf"},
         {"1"s + repeat("0", 400) + ".-1"s + repeat("0", 400) + ".", "nan"},
         {"."s + repeat("0", 400) + "1", "0.0"},
         {"9007199254740993.0", "9007199254740992.0"},
         {"9007199254740993."s + repeat("0", 900) + "1", "9007199254740994.0"}});
  check_nothing({"1"s + repeat("0", 309) + "*1.0", "1.5+1"s + repeat("0", 400)});
}

TEST_CASE("float repr") {
  const std::vector<std::pair<double, std::string>> table = {{1e15, "1000000000000000.0"},
                                                             {1e16, "1e+16"},
                                                             {123456789012345680.0, "1.2345678901234568e+17"},
                                                             {0.0001, "0.0001"},
                                                             {0.00001, "1e-05"},
                                                             {0.000012345, "1.2345e-05"},
                                                             {5e-324, "5e-324"},
                                                             {1.7976931348623157e308, "1.7976931348623157e+308"},
                                                             {100.0, "100.0"},
                                                             {12345.678, "12345.678"},
                                                             {-0.0, "-0.0"},
                                                             {std::nan(""), "nan"},
                                                             {-std::numeric_limits<double>::infinity(), "-inf"}};
  for (const auto& [value, expected] : table) CHECK(nanochat_x::internal::float_repr(value) == expected);
}

TEST_CASE("the grammar's other values") {
  check({{"()", "()"},
         {"()+()", "()"},
         {"()*3", "()"},
         {"-1*()", "()"},
         {"9223372036854775807*()", "()"},
         {"...", "Ellipsis"},
         {"(...)", "Ellipsis"}});
  check_nothing({"9223372036854775808*()", "()*1.0", "()*()", "()-()", "-()", "+...", "...*1", "()/1", "()+1"});
}

TEST_CASE("what Python refuses has no result") {
  check_nothing({"",     " ",     "1+",      "*1",   "1 2",  "01",   "1..5",   "1.5.5",   ".",    "..",
                 "....", "1...",  "(1",      "1)",   "(1))", "1(2)", "()()",   "1(",      "(*1)", "1*/2",
                 "///",  "1/ /2", "2 * * 3", "2**3", "1,,+", "1 .5", "(1)(2)", "1 // / 2"});
}

TEST_CASE("only the characters of one of the two kinds are taken") {
  check_nothing({"1e5", "0x10", "1_000", "10%3", "1<2", "1\n+1", "\t1", "1\xC2\xB2", "abs(1)", "1 if 1 else 2", "a"});
}

TEST_CASE("str.count") {
  check({{"'banana'.count('an')", "2"},
         {"\"strawberry\".count(\"r\")", "3"},
         {"'aaaa'.count('aa')", "2"},
         {"'abc'.count('')", "4"},
         {"''.count('a')", "0"},
         {"('banana').count(('a'))", "3"},
         {"('banana'.count('a'))", "3"},
         {"  'banana' .count( 'a' ) ", "3"},
         {"'ba' 'na' \"na\".count('n' 'a')", "2"},
         {"'''it's'''.count(\"'\")", "1"},
         {"r'ab'.count(F'b')", "1"},
         {"'a,b'.count(',')", "3"},  // commas go first, those in strings too: 'ab'.count('')
         {"'.count('", ".count("}});
}

TEST_CASE("nothing but str.count is evaluated") {
  check_nothing({"'profile'.count('e')",   // holds "file"
                 "'EVALuate'.count('e')",  // so does lower case of this
                 "'a__b'.count('a')",
                 "'a'.count()",
                 "'a'.count(1)",
                 "1.count('a')",
                 "(1.count('a'",
                 "(1).count('a')",
                 "'a'.count('a').count('a')",
                 "'a'.count('a').real",
                 "'a'.upper().count('A')",
                 "'a'.counts('a')",
                 "'a'.count",
                 "'a'.index('a'",
                 "b'a'.count(b'a')",
                 "ur'a'.count('a')",
                 "'a'.count('a') or 5",
                 "not 'a'.count('a')",
                 "'a'.count('a' if 1 else 'b')",
                 "'a'.count(x for x in 'a')",
                 "x.count('a')",
                 "'a'.count('a')'a'",
                 "'a'.count('a'",
                 "'a.count('a')",
                 "''''.count('a')",
                 "'a'.count('a'))",
                 "'a'.count('a')+1",
                 "'a'.count('\xC3\xA9')"});
}

TEST_CASE("the limits of CPython 3.11") {
  CHECK(calculate(repeat("(", 200) + "1"s + repeat(")", 200)) == "1");
  CHECK_FALSE(calculate(repeat("(", 201) + "1"s + repeat(")", 201)).has_value());
  CHECK(calculate(repeat("-", 2000) + "1") == "1");
  CHECK_FALSE(calculate(repeat("-", 3000) + "1").has_value());
  CHECK(calculate("1"s + repeat("+1", 2000)) == "2001");
  CHECK_FALSE(calculate("1"s + repeat("+1", 3000)).has_value());
  CHECK(calculate(repeat("(", 200) + repeat("-", 375) + "1"s + repeat(")", 200)) == "-1");
  CHECK_FALSE(calculate(repeat("(", 200) + repeat("-", 376) + "1"s + repeat(")", 200)).has_value());
  CHECK(calculate(repeat("9", 4300)) == repeat("9", 4300));
  CHECK_FALSE(calculate(repeat("9", 4301)).has_value());
  CHECK(calculate("-1"s + repeat("0", 4298) + "*10") == "-1"s + repeat("0", 4299));
  CHECK_FALSE(calculate("-1"s + repeat("0", 4299) + "*10").has_value());
  CHECK(calculate(repeat("9", 4300) + "*10//10") == repeat("9", 4300));
  CHECK(calculate(repeat("0", 5000)) == "0");
}

TEST_CASE("hostile expressions end soon and without a crash") {
  const int n = 100'000;
  CHECK_FALSE(calculate(repeat("(", n)).has_value());
  CHECK_FALSE(calculate(repeat("-", n)).has_value());
  CHECK_FALSE(calculate(repeat("1+", n / 2)).has_value());
  CHECK_FALSE(calculate(repeat(repeat("9", 4300) + "*", 23) + "1").has_value());
  CHECK_FALSE(calculate(repeat("1", 1'000'000)).has_value());
  CHECK(calculate("'"s + repeat("a", 60'000) + "'.count('"s + repeat("a", 30'000) + "b')") == "0");
  CHECK(calculate(repeat(",", n) + "7") == "7");
}
