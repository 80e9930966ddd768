#include "nanochat_x/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <ranges>
#include <string>

#include "nanochat_x/error.h"

// Built with -ffp-contract=off (cmake/Targets.cmake): a compiler that fuses a*b+c rounds once where others round twice,
// and the draws would differ between machines.
namespace nanochat_x {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One step of SplitMix64 (Steele, Lea, Flood 2014).
std::uint64_t split_mix(std::uint64_t& state) {
  state += 0x9e3779b97f4a7c15U;
  std::uint64_t z = state;
  z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9U;
  z = (z ^ (z >> 27U)) * 0x94d049bb133111ebU;
  return z ^ (z >> 31U);
}

// Tokens that may be drawn, ids ascending, each with its weight: probability times `total`.
struct Candidates {
  std::vector<std::int64_t> ids;
  std::vector<double> weights;
  double total = 0;
};

auto more_likely(std::span<const float> logits) {
  return [logits](std::int64_t a, std::int64_t b) {
    const float x = logits[static_cast<std::size_t>(a)], y = logits[static_cast<std::size_t>(b)];
    return x > y || (x == y && a < b);
  };
}

// The id of the largest logit, the lowest among equals.
std::int64_t checked_argmax(std::span<const float> logits) {
  if (logits.empty()) throw Error("no logits to sample from");
  std::size_t best = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (!(logits[i] < std::numeric_limits<float>::infinity())) {
      throw Error("the logit of token " + std::to_string(i) + " is " + (std::isnan(logits[i]) ? "NaN" : "infinite") +
                  ": the model's weights or its computation are broken");
    }
    if (logits[i] > logits[best]) best = i;
  }
  if (!(logits[best] > -std::numeric_limits<float>::infinity())) {
    throw Error("every logit is -infinity: the model's weights or its computation are broken");
  }
  return static_cast<std::int64_t>(best);
}

// Ids of the k most likely tokens, ascending.
std::vector<std::int64_t> top_k_ids(std::span<const float> logits, std::int64_t top_k) {
  const auto all = std::views::iota(std::int64_t{0}, static_cast<std::int64_t>(logits.size()));
  if (top_k == 0 || top_k >= std::ssize(logits)) {
    std::vector<std::int64_t> ids(logits.size());
    std::iota(ids.begin(), ids.end(), std::int64_t{0});
    return ids;
  }
  std::vector<std::int64_t> ids(static_cast<std::size_t>(top_k));
  std::ranges::partial_sort_copy(all, ids, more_likely(logits));  // a heap of k: one pass over the vocabulary
  std::ranges::sort(ids);
  return ids;
}

void set_weights(Candidates& kept, std::span<const float> logits, double largest, double temperature) {
  kept.weights.resize(kept.ids.size());
  for (std::size_t i = 0; i < kept.ids.size(); ++i) {
    const double logit = logits[static_cast<std::size_t>(kept.ids[i])];
    kept.weights[i] = portable_exp((logit - largest) / temperature);
  }
  kept.total = std::accumulate(kept.weights.begin(), kept.weights.end(), 0.0);
}

// Cuts `ids` to the fewest most likely ones whose weights reach `top_p` of the total. Sorts no more than it needs.
void cut_top_p(Candidates& kept, std::span<const float> logits, double largest, const SamplingParams& params) {
  const double enough = params.top_p * kept.total;
  auto& ids = kept.ids;
  double sum = 0;
  std::size_t begin = 0, block = 64;
  while (begin < ids.size()) {
    const std::size_t end = std::min(ids.size(), begin + block);
    const auto at = [&ids](std::size_t i) { return ids.begin() + static_cast<std::ptrdiff_t>(i); };
    std::partial_sort(at(begin), at(end), ids.end(), more_likely(logits));
    for (std::size_t i = begin; i < end; ++i) {
      sum += portable_exp((logits[static_cast<std::size_t>(ids[i])] - largest) / params.temperature);
      if (sum >= enough) {
        ids.resize(i + 1);
        return;
      }
    }
    begin = end;
    block *= 4;
  }
}

Candidates candidates(std::span<const float> logits, const SamplingParams& params) {
  const double largest = logits[static_cast<std::size_t>(checked_argmax(logits))];
  Candidates kept;
  kept.ids = top_k_ids(logits, params.top_k);
  set_weights(kept, logits, largest, params.temperature);
  if (params.top_p < 1) {
    cut_top_p(kept, logits, largest, params);
    std::ranges::sort(kept.ids);
    set_weights(kept, logits, largest, params.temperature);
  }
  return kept;
}

}  // namespace

void SamplingParams::validate() const {
  // written so that NaN fails too
  if (!(temperature >= 0 && temperature < kInfinity)) {
    throw Error("temperature must be 0 (greedy) or above, and finite; got " + std::to_string(temperature));
  }
  if (top_k < 0) throw Error("top_k must be 0 (all tokens) or above; got " + std::to_string(top_k));
  if (!(top_p > 0 && top_p <= 1)) throw Error("top_p must be above 0 and at most 1; got " + std::to_string(top_p));
}

Random::Random(std::uint64_t seed, std::uint64_t stream) {
  std::uint64_t state = split_mix(seed) + stream;
  const std::uint64_t init_state = split_mix(state);
  seed_pcg32(init_state, split_mix(state));
}

Random Random::pcg32(std::uint64_t init_state, std::uint64_t init_sequence) {
  Random random;
  random.seed_pcg32(init_state, init_sequence);
  return random;
}

void Random::seed_pcg32(std::uint64_t init_state, std::uint64_t init_sequence) {
  increment_ = (init_sequence << 1U) | 1U;
  state_ = 0;
  next_u32();
  state_ += init_state;
  next_u32();
}

std::uint32_t Random::next_u32() {
  const std::uint64_t old = state_;
  state_ = old * 6364136223846793005U + increment_;
  return std::rotr(static_cast<std::uint32_t>(((old >> 18U) ^ old) >> 27U), static_cast<int>(old >> 59U));
}

double Random::uniform() {
  const std::uint64_t high = next_u32() >> 5U;
  const std::uint64_t low = next_u32() >> 6U;
  return static_cast<double>((high << 26U) | low) * 0x1p-53;
}

Sampler::Sampler(const SamplingParams& params, std::uint64_t stream) : params_(params), random_(params.seed, stream) {
  params_.validate();
}

std::int64_t Sampler::sample(std::span<const float> logits) {
  if (params_.temperature == 0) return checked_argmax(logits);
  const Candidates kept = candidates(logits, params_);
  const double target = random_.uniform() * kept.total;
  double sum = 0;
  for (std::size_t i = 0; i < kept.ids.size(); ++i) {
    sum += kept.weights[i];
    if (sum > target) return kept.ids[i];
  }
  // never reached: the loop adds up to `total` itself, and u < 1 keeps u * total below it
  throw Error("no token could be drawn");
}

std::vector<double> Sampler::probabilities(std::span<const float> logits, const SamplingParams& params) {
  params.validate();
  std::vector<double> result(logits.size(), 0.0);
  if (params.temperature == 0) {
    result[static_cast<std::size_t>(checked_argmax(logits))] = 1;
    return result;
  }
  const Candidates kept = candidates(logits, params);
  for (std::size_t i = 0; i < kept.ids.size(); ++i) {
    result[static_cast<std::size_t>(kept.ids[i])] = kept.weights[i] / kept.total;
  }
  return result;
}

double portable_exp(double x) {
  if (!(x > -746)) return std::isnan(x) ? x : 0.0;  // below the smallest subnormal number
  // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, so that n * high is exact
  constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  const double n = std::floor(x * 0x1.71547652b82fep+0 + 0.5);
  const double r = (x - n * kLn2High) - n * kLn2Low;
  // Taylor's series of (e^r - 1) / r up to r^13 / 13!, whose next term is below 2^-57
  constexpr double kCoefficients[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0};
  double sum = 0;
  for (const double c : kCoefficients) sum = sum * r + c;
  const double e_r = 1 + r * sum;
  const auto power_of_two = [](int exponent) {
    return std::bit_cast<double>(static_cast<std::uint64_t>(exponent + 1023) << 52U);
  };
  const int exponent = static_cast<int>(n);
  if (exponent >= -1022) return e_r * power_of_two(exponent);
  return e_r * power_of_two(exponent + 1000) * power_of_two(-1000);  // the result is subnormal
}

}  // namespace nanochat_x
