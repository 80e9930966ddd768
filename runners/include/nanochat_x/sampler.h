#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace nanochat_x {

/// How the next token is drawn. Order: temperature, top-k, top-p.
struct SamplingParams {
  double temperature = 0.6;  ///< 0: greedy (the lowest id among equal largest logits)
  std::int64_t top_k = 50;   ///< keep the k most likely tokens, ties by the lower id; 0: all
  double top_p = 1.0;        ///< then keep the smallest set of most likely tokens with at least this probability
  std::uint64_t seed = 42;   ///< with the sample's index, the state of the generator

  /// Throws Error naming the field that is out of range (temperature >= 0 and finite, top_k >= 0, 0 < top_p <= 1).
  void validate() const;
};

/// PCG32 (O'Neill 2014, XSH-RR 64/32), seeded through SplitMix64: the same draws on every platform.
class Random {
 public:
  Random(std::uint64_t seed, std::uint64_t stream);
  /// The generator as its author seeds it (`pcg32_srandom`), for checking against the published values.
  static Random pcg32(std::uint64_t init_state, std::uint64_t init_sequence);
  std::uint32_t next_u32();
  /// Uniform in [0, 1) with 53 random bits.
  double uniform();

 private:
  Random() = default;
  void seed_pcg32(std::uint64_t init_state, std::uint64_t init_sequence);
  std::uint64_t state_ = 0, increment_ = 0;
};

/// Draws tokens for one sample.
class Sampler {
 public:
  /// `stream` is the sample's index: samples of one seed are independent of each other and of their number.
  Sampler(const SamplingParams& params, std::uint64_t stream);
  /// One token id from a row of `vocab` logits: one uniform number u, then the first id (ids ascending) at which the
  /// cumulated probability is above u. Greedy draws nothing. Throws Error if a logit is NaN or +inf, or all are -inf.
  std::int64_t sample(std::span<const float> logits);

  /// The distribution that `sample` draws from, `vocab` probabilities (0 for what top-k and top-p cut).
  static std::vector<double> probabilities(std::span<const float> logits, const SamplingParams& params);

 private:
  SamplingParams params_;
  Random random_;
};

/// e^x for x <= 0 from +, -, * and exponent bits alone, so the same bits on every IEEE 754 machine. Relative error
/// below 1e-15 where the result is a normal number.
double portable_exp(double x);

}  // namespace nanochat_x
