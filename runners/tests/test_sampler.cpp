#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "nanochat_x/error.h"
#include "nanochat_x/sampler.h"

using nanochat_x::Error;
using nanochat_x::Random;
using nanochat_x::Sampler;
using nanochat_x::SamplingParams;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

SamplingParams params(double temperature, std::int64_t top_k = 0, double top_p = 1, std::uint64_t seed = 42) {
  return {.temperature = temperature, .top_k = top_k, .top_p = top_p, .seed = seed};
}

std::vector<float> random_logits(std::size_t n, std::uint64_t seed, double width = 6) {
  Random random(seed, 0);
  std::vector<float> logits(n);
  for (float& x : logits) x = static_cast<float>(width * random.uniform());
  return logits;
}

std::set<std::size_t> support(const std::vector<double>& probabilities) {
  std::set<std::size_t> ids;
  for (std::size_t i = 0; i < probabilities.size(); ++i) {
    if (probabilities[i] > 0) ids.insert(i);
  }
  return ids;
}

// Pearson's statistic of `draws` draws against `expected`, and the value that it passes once in some 30,000 times
// (the normal approximation's four sigma).
struct ChiSquare {
  double statistic, limit;
};

ChiSquare chi_square(Sampler& sampler, const std::vector<float>& logits, const std::vector<double>& expected) {
  constexpr int kDraws = 40000;
  std::vector<int> counts(logits.size());
  for (int i = 0; i < kDraws; ++i) ++counts[static_cast<std::size_t>(sampler.sample(logits))];
  double statistic = 0;
  int cells = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double mean = kDraws * expected[i];
    if (mean == 0) {
      CHECK(counts[i] == 0);
      continue;
    }
    statistic += (counts[i] - mean) * (counts[i] - mean) / mean;
    ++cells;
  }
  const double freedom = cells - 1;
  return {statistic, freedom + 4 * std::sqrt(2 * freedom) + 4};
}

}  // namespace

TEST_CASE("PCG32 gives the values that its author published for seed 42, sequence 54") {
  Random random = Random::pcg32(42, 54);
  for (const std::uint32_t expected : {0xa15c02b7U, 0x7b47f409U, 0xba1d3330U, 0x83d2f293U, 0xbfa4784bU, 0xcbed606eU}) {
    CHECK(random.next_u32() == expected);
  }
}

TEST_CASE("streams and seeds give different draws, the same pair the same ones") {
  std::set<std::uint32_t> firsts;
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    for (std::uint64_t stream = 0; stream < 50; ++stream) firsts.insert(Random(seed, stream).next_u32());
  }
  CHECK(firsts.size() == 2500);
  Random a(7, 3), b(7, 3);
  for (int i = 0; i < 10; ++i) CHECK(a.next_u32() == b.next_u32());
}

TEST_CASE("uniform is in [0, 1), with the mean and variance of the uniform distribution") {
  Random random(1, 0);
  double sum = 0, squares = 0;
  constexpr int kDraws = 100000;
  for (int i = 0; i < kDraws; ++i) {
    const double u = random.uniform();
    REQUIRE(u >= 0);
    REQUIRE(u < 1);
    sum += u;
    squares += u * u;
  }
  CHECK(std::abs(sum / kDraws - 0.5) < 5 * std::sqrt(1.0 / 12 / kDraws));
  CHECK(std::abs(squares / kDraws - 1.0 / 3) < 0.005);
}

TEST_CASE("portable_exp agrees with the C library") {
  double worst = 0;
  for (double x = 0; x > -708; x -= 0.00937) {
    const long double exact = std::exp(static_cast<long double>(x));
    const long double error = std::abs(static_cast<long double>(nanochat_x::portable_exp(x)) - exact) / exact;
    worst = std::max(worst, static_cast<double>(error));
  }
  CHECK(worst < 1e-15);
  CHECK(worst > 0);  // the comparison compares something
  CHECK(nanochat_x::portable_exp(0) == 1);
  CHECK(nanochat_x::portable_exp(-740) == doctest::Approx(std::exp(-740.0)).epsilon(0.01));  // subnormal
  CHECK(nanochat_x::portable_exp(-800) == 0);
  CHECK(nanochat_x::portable_exp(-std::numeric_limits<double>::infinity()) == 0);
  CHECK(std::isnan(nanochat_x::portable_exp(std::numeric_limits<double>::quiet_NaN())));
}

TEST_CASE("temperature 0 takes the largest logit, the lowest id among equals") {
  const std::vector<float> logits = {1, 5, -kInf, 5, 2};
  Sampler sampler(params(0, 1, 0.1), 0);
  for (int i = 0; i < 5; ++i) CHECK(sampler.sample(logits) == 1);
  CHECK(Sampler::probabilities(logits, params(0)) == std::vector<double>{0, 1, 0, 0, 0});
}

TEST_CASE("probabilities are the softmax of logits / temperature") {
  const auto logits = random_logits(300, 5);
  for (const double temperature : {0.25, 0.6, 1.0, 3.0}) {
    const auto result = Sampler::probabilities(logits, params(temperature));
    double total = 0;
    for (const float x : logits) total += std::exp(x / temperature);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      CHECK(result[i] == doctest::Approx(std::exp(logits[i] / temperature) / total).epsilon(1e-12));
    }
  }
}

TEST_CASE("top-k keeps exactly k tokens, ties by the lower id") {
  const std::vector<float> logits = {1, 3, 3, 2, 3, 0};
  CHECK(support(Sampler::probabilities(logits, params(1, 1))) == std::set<std::size_t>{1});
  CHECK(support(Sampler::probabilities(logits, params(1, 2))) == std::set<std::size_t>{1, 2});
  CHECK(support(Sampler::probabilities(logits, params(1, 4))) == std::set<std::size_t>{1, 2, 3, 4});
  CHECK(support(Sampler::probabilities(logits, params(1, 6))).size() == 6);
  CHECK(support(Sampler::probabilities(logits, params(1, 600))).size() == 6);
  CHECK(support(Sampler::probabilities(logits, params(1, 0))).size() == 6);
  const auto kept = Sampler::probabilities(logits, params(1, 2));
  CHECK(kept[1] == 0.5);
  CHECK(kept[2] == 0.5);
}

TEST_CASE("top-p keeps the smallest set of the most likely tokens that reaches p") {
  // probabilities 0.5, 0.25, 0.125, 0.125 in another order of ids; the cuts lie well between their sums
  const auto ln = [](double p) { return static_cast<float>(std::log(p)); };
  const std::vector<float> logits = {ln(0.125), ln(0.5), ln(0.125), ln(0.25)};
  const auto kept = [&](double p) { return support(Sampler::probabilities(logits, params(1, 0, p))); };
  CHECK(kept(1e-9) == std::set<std::size_t>{1});
  CHECK(kept(0.49) == std::set<std::size_t>{1});
  CHECK(kept(0.51) == std::set<std::size_t>{1, 3});
  CHECK(kept(0.74) == std::set<std::size_t>{1, 3});
  CHECK(kept(0.76) == std::set<std::size_t>{0, 1, 3});  // a tie: the lower id
  CHECK(kept(0.9) == std::set<std::size_t>{0, 1, 2, 3});
  const auto result = Sampler::probabilities(logits, params(1, 0, 0.7));
  CHECK(result[1] == doctest::Approx(2.0 / 3));
  CHECK(result[3] == doctest::Approx(1.0 / 3));
  // the order is top-k first: of {0.5, 0.25} renormalised, 0.5 is two thirds
  CHECK(support(Sampler::probabilities(logits, params(1, 2, 0.6))) == std::set<std::size_t>{1});
}

TEST_CASE("top-p over a large vocabulary equals a full sort") {
  const auto logits = random_logits(5000, 11);
  for (const double p : {0.001, 0.05, 0.5, 0.9, 0.999}) {
    const auto all = Sampler::probabilities(logits, params(0.8));
    std::vector<std::size_t> order(logits.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return logits[a] > logits[b]; });
    std::set<std::size_t> expected;
    double sum = 0;
    for (const std::size_t id : order) {
      expected.insert(id);
      if ((sum += all[id]) >= p) break;
    }
    CHECK(support(Sampler::probabilities(logits, params(0.8, 0, p))) == expected);
  }
}

TEST_CASE("draws follow the probabilities") {
  const auto logits = random_logits(40, 3, 3);
  for (const SamplingParams& p : {params(1), params(0.7, 10), params(1.5, 0, 0.8), params(0.9, 20, 0.9, 7)}) {
    Sampler sampler(p, 0);
    const ChiSquare fit = chi_square(sampler, logits, Sampler::probabilities(logits, p));
    CHECK(fit.statistic < fit.limit);
  }
  Sampler sampler(params(1), 0);  // and the check sees a distribution that is a little off
  const ChiSquare misfit = chi_square(sampler, logits, Sampler::probabilities(logits, params(1.1)));
  CHECK(misfit.statistic > misfit.limit);
}

TEST_CASE("a seed repeats its draws; another seed or stream does not") {
  const auto logits = random_logits(1000, 9);
  const auto draws = [&](std::uint64_t seed, std::uint64_t stream) {
    Sampler sampler(params(1, 0, 1, seed), stream);
    std::vector<std::int64_t> ids;
    for (int i = 0; i < 20; ++i) ids.push_back(sampler.sample(logits));
    return ids;
  };
  CHECK(draws(1, 0) == draws(1, 0));
  CHECK(draws(1, 0) != draws(2, 0));
  CHECK(draws(1, 0) != draws(1, 1));
}

TEST_CASE("tokens of probability zero are never drawn") {
  const std::vector<float> logits = {-kInf, 1, -kInf, 1, -kInf};
  Sampler sampler(params(1, 4), 0);  // k reaches into the -inf
  for (int i = 0; i < 200; ++i) CHECK(sampler.sample(logits) % 2 == 1);
  // a temperature so small that every other token's weight vanishes
  const std::vector<float> close = {1.0F, 1.0001F, 0.5F};
  Sampler cold(params(1e-300), 0);
  for (int i = 0; i < 20; ++i) CHECK(cold.sample(close) == 1);
}

TEST_CASE("logits that cannot be sampled from are an error") {
  for (const double temperature : {0.0, 1.0}) {
    Sampler sampler(params(temperature, 2), 0);
    CHECK_THROWS_WITH_AS(sampler.sample(std::vector<float>{0, kNan, 1}), doctest::Contains("token 1 is NaN"), Error);
    CHECK_THROWS_WITH_AS(sampler.sample(std::vector<float>{0, 1, kInf}), doctest::Contains("token 2 is infinite"),
                         Error);
    CHECK_THROWS_WITH_AS(sampler.sample(std::vector<float>{-kInf, -kInf}), doctest::Contains("every logit"), Error);
    CHECK_THROWS_AS(sampler.sample(std::vector<float>{}), Error);
  }
}

TEST_CASE("options out of range are an error that names the option") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double t : {-0.1, nan, std::numeric_limits<double>::infinity()}) {
    CHECK_THROWS_WITH_AS(params(t).validate(), doctest::Contains("temperature"), Error);
  }
  CHECK_THROWS_WITH_AS(params(1, -1).validate(), doctest::Contains("top_k"), Error);
  for (const double p : {0.0, -0.5, 1.5, nan}) {
    CHECK_THROWS_WITH_AS(params(1, 0, p).validate(), doctest::Contains("top_p"), Error);
  }
  CHECK_THROWS_AS(Sampler(params(-1), 0), Error);
}
