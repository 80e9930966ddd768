#pragma once

#include <vector>

namespace nanochat_x::internal {

/// The middle and the ends of what was measured several times.
struct Spread {
  double median = 0, min = 0, max = 0;
};

/// Of an even number of values the median is the mean of the two in the middle. Throws Error for none at all and for
/// one that is not finite.
Spread spread_of(std::vector<double> values);

}  // namespace nanochat_x::internal
