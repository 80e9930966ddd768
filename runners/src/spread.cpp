#include "spread.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "nanochat_x/error.h"

namespace nanochat_x::internal {

Spread spread_of(std::vector<double> values) {
  if (values.empty()) throw Error("nothing was measured, so there is no median of it");
  if (!std::ranges::all_of(values, [](double value) { return std::isfinite(value); })) {
    throw Error("a measured value is not finite");
  }
  std::ranges::sort(values);
  const std::size_t half = values.size() / 2;
  const double median = values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
  return {.median = median, .min = values.front(), .max = values.back()};
}

}  // namespace nanochat_x::internal
