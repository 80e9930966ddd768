#include "weights.h"

#include <cmath>
#include <cstring>
#include <random>

namespace nanochat_x::test {
namespace {

std::size_t element_bytes(Format format) {
  switch (format) {
    case Format::float32:
      return 4;
    case Format::bfloat16:
    case Format::float16:
      return 2;
    default:
      return 1;
  }
}

void fill_plain(Weights& w, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  const std::size_t size = element_bytes(w.format);
  for (std::size_t i = 0; i < w.exact.size(); ++i) {
    std::uint8_t* at = w.bytes.data() + size * (i + 1);
    if (w.format == Format::float32) {
      const float value = uniform(random);
      std::memcpy(at, &value, sizeof value);
      w.exact[i] = value;
    } else {
      const std::uint16_t bits = random_bits(w.format, static_cast<std::uint32_t>(random()));
      std::memcpy(at, &bits, sizeof bits);
      w.exact[i] = value_of(w.format, bits);
    }
  }
}

void fill_grouped(Weights& w, std::mt19937& random) {
  const auto group = static_cast<std::size_t>(w.group);
  for (std::size_t g = 0; g < w.exact.size() / group; ++g) {
    w.scales[g + 1] = random_bits(Format::bfloat16, static_cast<std::uint32_t>(random()));
    w.zeros[g + 1] = static_cast<std::uint8_t>(random() % 16);
    const double scale = value_of(Format::bfloat16, w.scales[g + 1]);
    for (std::size_t i = 0; i < group; ++i) {
      double& exact = w.exact[g * group + i];
      if (w.format == Format::int8) {
        const auto q = static_cast<std::uint8_t>(random());
        w.bytes[1 + g * group + i] = q;
        exact = scale * (q < 128 ? q : q - 256);
      } else {
        const std::uint32_t q = random() % 16;
        const bool high = i >= group / 2;
        std::uint8_t& byte = w.bytes[1 + g * group / 2 + i % (group / 2)];
        byte = static_cast<std::uint8_t>(high ? byte | (q << 4) : q);
        exact = scale * (static_cast<double>(q) - w.zeros[g + 1]);
      }
    }
  }
}

}  // namespace

std::string name_of(Format format) {
  constexpr const char* names[] = {"float32", "bfloat16", "float16", "int8", "int4"};
  return names[static_cast<int>(format)];
}

kernels::Type type_of(Format format) {
  switch (format) {
    case Format::bfloat16:
      return kernels::Type::bfloat16;
    case Format::float16:
      return kernels::Type::float16;
    default:
      return kernels::Type::float32;
  }
}

std::uint16_t random_bits(Format format, std::uint32_t random) {
  const std::uint32_t sign = (random & 1) << 15, digits = random >> 16;
  // 11 exponents up to that of 1, subnormal numbers among float16's
  if (format == Format::float16) return static_cast<std::uint16_t>(sign | ((random >> 1) % 16) << 10 | (digits & 1023));
  return static_cast<std::uint16_t>(sign | (117 + (random >> 1) % 11) << 7 | (digits & 127));
}

double value_of(Format format, std::uint16_t bits) {
  const int fraction_bits = format == Format::float16 ? 10 : 7, bias = format == Format::float16 ? 15 : 127;
  const int exponent = (bits & 0x7fff) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
  const double magnitude = exponent == 0 ? std::ldexp(fraction, 1 - bias - fraction_bits)
                                         : std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  return bits >> 15 ? -magnitude : magnitude;
}

std::vector<float> random_floats(std::size_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(count);
  for (float& value : values) value = uniform(random);
  return values;
}

std::vector<float> uneven_floats(std::int64_t count, std::int64_t group, std::uint32_t seed) {
  std::vector<float> values = random_floats(static_cast<std::size_t>(count), seed);
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] *= std::exp2(static_cast<float>(static_cast<std::int64_t>(i) / group % 9 - 4));
  }
  return values;
}

std::int64_t wrong(const Weights& w, const std::vector<double>& x, std::int64_t M, const std::vector<float>& y,
                   std::int64_t n) {
  const double roundings = static_cast<double>(n), g = roundings * kUnit / (1 - roundings * kUnit);
  std::int64_t found = 0;
  for (std::int64_t m = 0; m < M; ++m) {
    for (std::int64_t row = 0; row < w.N; ++row) {
      double sum = 0, magnitudes = 0;
      for (std::int64_t k = 0; k < w.K; ++k) {
        const double product =
            x[static_cast<std::size_t>(m * w.K + k)] * w.exact[static_cast<std::size_t>(row * w.K + k)];
        sum += product;
        magnitudes += std::abs(product);
      }
      // (not "greater": NaN must count)
      found += !(std::abs(y[static_cast<std::size_t>(m * w.N + row)] - sum) <= g * magnitudes);
    }
  }
  return found;
}

Weights random_weights(Format format, std::int64_t N, std::int64_t K, std::int64_t group, std::uint32_t seed) {
  std::mt19937 random(seed);
  Weights w{format, N, K, group, {}, {}, {}, {}};
  const auto count = static_cast<std::size_t>(N * K);
  w.exact.resize(count);
  const bool grouped = format == Format::int8 || format == Format::int4;
  const std::size_t size = element_bytes(format);
  w.bytes.resize(size + (format == Format::int4 ? count / 2 : count * size));
  if (grouped) {
    w.scales.resize(count / static_cast<std::size_t>(group) + 1);
    w.zeros.resize(w.scales.size());
    fill_grouped(w, random);
  } else {
    fill_plain(w, random);
  }
  return w;
}

const void* Weights::stored() const { return bytes.data() + element_bytes(format); }

void Weights::multiply(const float* x, std::int64_t M, float* y, std::int64_t y_stride, std::int64_t begin,
                       std::int64_t end) const {
  if (format == Format::int8) {
    const auto* q = static_cast<const std::int8_t*>(stored());
    kernels::linear_int8(x, M, K, q, scales.data() + 1, group, y, y_stride, begin, end);
  } else if (format == Format::int4) {
    const auto* q = static_cast<const std::uint8_t*>(stored());
    kernels::linear_int4(x, M, K, q, scales.data() + 1, zeros.data() + 1, group, y, y_stride, begin, end);
  } else {
    kernels::linear(x, M, K, stored(), type_of(format), y, y_stride, begin, end);
  }
}

namespace {

template <typename Out>
void widen_grouped(const Weights& w, Out* out, std::int64_t begin, std::int64_t end) {
  if (w.format == Format::int8) {
    const auto* q = static_cast<const std::int8_t*>(w.stored());
    kernels::widen_int8(w.K, q, w.scales.data() + 1, w.group, out, begin, end);
  } else {
    const auto* q = static_cast<const std::uint8_t*>(w.stored());
    kernels::widen_int4(w.K, q, w.scales.data() + 1, w.zeros.data() + 1, w.group, out, begin, end);
  }
}

}  // namespace

std::vector<float> Weights::widened(std::int64_t begin, std::int64_t end) const {
  std::vector<float> out(static_cast<std::size_t>((end - begin) * K));
  widen_grouped(*this, out.data(), begin, end);
  return out;
}

std::vector<std::uint16_t> Weights::rounded(std::int64_t begin, std::int64_t end) const {
  std::vector<std::uint16_t> out(static_cast<std::size_t>((end - begin) * K));
  widen_grouped(*this, out.data(), begin, end);
  return out;
}

}  // namespace nanochat_x::test
