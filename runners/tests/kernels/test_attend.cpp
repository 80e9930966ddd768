#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "error_of.h"
#include "instruction_sets.h"
#include "kernels.h"
#include "weights.h"

using namespace nanochat_x::test;
namespace kernels = nanochat_x::kernels;

namespace {

/// Queries, keys and values, the latter in runs of the given lengths.
struct Attention {
  std::int64_t heads, width;
  float scale;
  std::vector<float> q;
  std::vector<Weights> keys, values;  // one pair a run

  std::int64_t q_stride() const { return width + 5; }
  std::int64_t out_stride() const { return width + 2; }

  std::vector<float> result() const {
    std::vector<kernels::Run> runs;
    for (std::size_t i = 0; i < keys.size(); ++i) runs.push_back({keys[i].stored(), values[i].stored(), keys[i].N});
    std::vector<float> out(static_cast<std::size_t>(heads * out_stride()), -1);
    kernels::attend(q.data(), q_stride(), heads, width, scale, runs, type_of(keys[0].format), out.data(), out_stride());
    return out;
  }
};

Attention random_attention(Format format, std::int64_t heads, std::int64_t width,
                           const std::vector<std::int64_t>& counts, float scale) {
  Attention a{heads, width, scale, {}, {}, {}};
  a.q = random_floats(static_cast<std::size_t>(heads * a.q_stride()), 3);
  std::uint32_t seed = 20;
  for (const std::int64_t count : counts) {
    a.keys.push_back(random_weights(format, count, width, 1, ++seed));
    a.values.push_back(random_weights(format, count, width, 1, ++seed));
  }
  return a;
}

struct Head {
  std::vector<double> scores, sum, magnitudes;  // [keys], and sum of p v and of p |v|: [width]
  double score_error = 0;                       // the most that a score in float32 may be off
};

/// One head in double.
Head exact_head(const Attention& a, std::int64_t h) {
  Head head;
  const float* q = a.q.data() + h * a.q_stride();
  for (const Weights& keys : a.keys) {
    for (std::int64_t j = 0; j < keys.N; ++j) {
      double score = 0, magnitude = 0;
      for (std::int64_t d = 0; d < a.width; ++d) {
        const double product = double{q[d]} * keys.exact[static_cast<std::size_t>(j * a.width + d)];
        score += product;
        magnitude += std::abs(product);
      }
      head.scores.push_back(score * a.scale);
      head.score_error =
          std::max(head.score_error, std::abs(a.scale) * magnitude * static_cast<double>(a.width + 2) * kUnit);
    }
  }
  const double largest = *std::ranges::max_element(head.scores);
  double total = 0;
  for (const double score : head.scores) total += std::exp(score - largest);
  head.sum.resize(static_cast<std::size_t>(a.width));
  head.magnitudes = head.sum;
  std::size_t j = 0;
  for (const Weights& values : a.values) {
    for (std::int64_t row = 0; row < values.N; ++row, ++j) {
      const double p = std::exp(head.scores[j] - largest) / total;
      for (std::size_t d = 0; d < head.sum.size(); ++d) {
        const double value = values.exact[static_cast<std::size_t>(row) * head.sum.size() + d];
        head.sum[d] += p * value;
        head.magnitudes[d] += p * std::abs(value);
      }
    }
  }
  return head;
}

/// How many numbers are further from attention in double than float32 allows.
///
/// A factor exp(score - largest) is relatively off by as much as its exponent is absolutely: by the score's own error,
/// by u |score - largest| of the subtraction, as much again for all later changes of `largest` together, and by 2 u for
/// exp (Highway: 1 ulp). Each of the changes, at most one a key, costs 4 roundings more (exp 2, product, sum); adding
/// up the keys one each. It counts twice: in the sum of values and in the sum that divides it.
std::int64_t wrong(const Attention& a, const std::vector<float>& out) {
  std::int64_t found = 0;
  for (std::int64_t h = 0; h < a.heads; ++h) {
    const Head head = exact_head(a, h);
    const auto [least, most] = std::ranges::minmax_element(head.scores);
    const double roundings = 2 * (*most - *least) + 5 * static_cast<double>(head.scores.size()) + 4;
    const double relative = 2 * (head.score_error + roundings * kUnit);
    for (std::int64_t d = 0; d < a.out_stride(); ++d) {
      const double got = out[static_cast<std::size_t>(h * a.out_stride() + d)];
      if (d >= a.width) {
        found += got != -1;
      } else {
        const auto i = static_cast<std::size_t>(d);
        found += !(std::abs(got - head.sum[i]) <= relative * head.magnitudes[i]);
      }
    }
  }
  return found;
}

}  // namespace

TEST_CASE("attend: all types, any width, any number of heads") {
  with_each_instruction_set([] {
    for (const Format format : {Format::float32, Format::bfloat16, Format::float16}) {
      for (const std::int64_t width : {1, 5, 8, 16, 33, 64, 96, 128, 200}) {
        for (const std::int64_t heads : {1, 2, 3, 4, 5, 9}) {
          CAPTURE(name_of(format));
          CAPTURE(width);
          CAPTURE(heads);
          const Attention a = random_attention(format, heads, width, {71}, 1 / std::sqrt(static_cast<float>(width)));
          CHECK(wrong(a, a.result()) == 0);
        }
      }
    }
  });
}

TEST_CASE("attend: runs of any length, some of them empty") {
  with_each_instruction_set([] {
    const std::vector<std::vector<std::int64_t>> parts = {
        {1}, {63}, {64}, {65}, {0, 1}, {1, 0}, {0, 0, 5, 0, 130, 0}, {1, 1, 1}, {300, 1}, {64, 64, 64, 7}};
    for (const Format format : {Format::float32, Format::bfloat16, Format::float16}) {
      for (const std::vector<std::int64_t>& counts : parts) {
        CAPTURE(name_of(format));
        CAPTURE(counts.size());
        CAPTURE(counts[0]);
        const Attention a = random_attention(format, 3, 64, counts, 0.125F);
        CHECK(wrong(a, a.result()) == 0);
      }
    }
  });
}

TEST_CASE("attend: scores that exp does not take overflow nothing, whatever their order and sign") {
  with_each_instruction_set([] {
    for (const float scale : {-3000.0F, -40.0F, 0.0F, 40.0F, 3000.0F}) {
      CAPTURE(scale);
      const Attention a = random_attention(Format::float32, 2, 32, {100, 100}, scale);
      const std::vector<float> out = a.result();
      CHECK(std::ranges::all_of(out, [](float value) { return std::isfinite(value); }));
      CHECK(wrong(a, out) == 0);
    }
  });
}

TEST_CASE("attend: NaN among keys, values or queries is not hidden") {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  with_each_instruction_set([] {
    for (const std::size_t key : {0, 70, 129}) {
      CAPTURE(key);
      Attention a = random_attention(Format::float32, 2, 16, {130}, 0.25F);
      std::vector<float> k(130 * 16), v = random_floats(130 * 16, 4), out(32);
      std::copy(a.keys[0].exact.begin(), a.keys[0].exact.end(), k.begin());
      const auto attend = [&] {
        const kernels::Run run{k.data(), v.data(), 130};
        kernels::attend(a.q.data(), a.q_stride(), 2, 16, 0.25F, {&run, 1}, kernels::Type::float32, out.data(), 16);
        return static_cast<int>(std::ranges::count_if(out, [](float value) { return std::isnan(value); }));
      };
      CHECK(attend() == 0);
      a.q[3] = nan;
      CHECK(attend() == 16);  // one head of two
      a.q[3] = 1;
      v[key * 16 + 5] = nan;
      CHECK(attend() == 2);  // one column of both heads
      v[key * 16 + 5] = 1;
      k[key * 16 + 5] = nan;
      CHECK(attend() == 32);
    }
  });
}

TEST_CASE("attend: scores of minus infinity count nothing, be they first or last") {
  constexpr float inf = std::numeric_limits<float>::infinity();
  with_each_instruction_set([] {
    const std::vector<float> q = {1}, values = {3, 5};
    std::vector<float> out(1);
    for (const bool first : {true, false}) {
      // two runs, so that what is infinite is a block of its own
      const std::vector<float> keys = first ? std::vector<float>{-inf, 2} : std::vector<float>{2, -inf};
      const kernels::Run runs[] = {{keys.data(), values.data(), 1}, {keys.data() + 1, values.data() + 1, 1}};
      kernels::attend(q.data(), 1, 1, 1, 1, runs, kernels::Type::float32, out.data(), 1);
      CHECK(out[0] == (first ? 5 : 3));
    }
  });
}

TEST_CASE("attend: a wrong answer is seen") {
  Attention a = random_attention(Format::bfloat16, 2, 128, {200, 33}, 0.0883F);
  const std::vector<float> out = a.result();
  REQUIRE(wrong(a, out) == 0);
  std::swap(a.values[1], a.keys[1]);
  CHECK(wrong(a, out) > 200);
  std::swap(a.values[1], a.keys[1]);
  a.values[0].exact[5 * 128 + 7] += 0.5;  // one value of one key
  CHECK(wrong(a, out) == 2);
  a.values[0].exact[5 * 128 + 7] -= 0.5;
  a.keys.pop_back();
  a.values.pop_back();
  CHECK(wrong(a, out) > 200);
}

TEST_CASE("attend: no key, no head and no column are refused") {
  const std::vector<float> q(4);
  std::vector<float> out(4);
  const auto attend = [&](std::int64_t heads, std::int64_t width, std::vector<kernels::Run> runs) {
    return error_of(
        [&] { kernels::attend(q.data(), 1, heads, width, 1, runs, kernels::Type::float32, out.data(), 1); });
  };
  CHECK(attend(1, 1, {}) == "attention over no key at all has no result");
  CHECK(attend(1, 1, {{nullptr, nullptr, 0}, {nullptr, nullptr, 0}}) == "attention over no key at all has no result");
  CHECK(attend(0, 1, {{q.data(), q.data(), 1}}) == "attention takes 1 head and 1 column or more; got 0 and 1");
  CHECK(attend(1, 0, {{q.data(), q.data(), 1}}) == "attention takes 1 head and 1 column or more; got 1 and 0");
}
