#pragma once

// Random matrices, in bfloat16 or as docs/quantization.md has them in 8 and 4 bits, on the card and as floats.

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <span>
#include <thread>
#include <vector>

#include "../decoder.h"
#include "../device_memory.h"
#include "../packed_weights.h"

namespace nanochat_x::cuda {

inline std::uint16_t to_bfloat16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16U) & 1U)) >> 16U);
}
inline float from_bfloat16(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16U); }

/// Numbers in [0, 1) by SplitMix64 of the index: to[i] = make(number). On all cores.
class Draw {
 public:
  explicit Draw(std::uint64_t seed) : salt_(seed << 32U) {}

  template <typename T, typename Make>
  std::vector<T> operator()(std::int64_t count, Make make) {
    ++salt_;
    std::vector<T> to(static_cast<std::size_t>(count));
    on_all_cores(to.size(), [&, base = salt_ * 0x9e3779b97f4a7c15U](std::size_t i) {
      std::uint64_t z = base + (i + 1) * 0xbf58476d1ce4e5b9U;
      z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9U;
      z = (z ^ (z >> 27U)) * 0x94d049bb133111ebU;
      to[i] = make(static_cast<double>((z ^ (z >> 31U)) >> 11U) * 0x1p-53);
    });
    return to;
  }
  /// bfloat16, uniform in +-bound.
  std::vector<std::uint16_t> uniform(std::int64_t count, double bound) {
    return (*this).operator()<std::uint16_t>(
        count, [=](double u) { return to_bfloat16(static_cast<float>(bound * (2 * u - 1))); });
  }

  template <typename Work>
  static void on_all_cores(std::size_t count, Work work) {
    const std::size_t threads = std::max(1U, std::thread::hardware_concurrency());
    std::vector<std::jthread> pool;
    for (std::size_t t = 0; t < threads; ++t) {
      pool.emplace_back([=] {
        for (std::size_t i = count * t / threads; i < count * (t + 1) / threads; ++i) work(i);
      });
    }
  }

 private:
  std::uint64_t salt_;
};

/// A matrix [rows, columns] whose elements lie in about +-bound.
class RandomMatrix {
 public:
  RandomMatrix(Draw& draw, std::int64_t rows, std::int64_t columns, double bound, int bits, std::int64_t group)
      : values(static_cast<std::size_t>(rows * columns)), rows_(rows), columns_(columns), bits_(bits), group_(group) {
    if (bits == 16) {
      const auto halves = draw.uniform(rows * columns, bound);
      rounded_ = halves;
      Draw::on_all_cores(values.size(), [&](std::size_t i) { values[i] = from_bfloat16(halves[i]); });
      return;
    }
    const std::int64_t groups = rows * columns / group;
    const double step = bound / (bits == 8 ? 127 : 7.5);
    scales_ = draw.operator()<std::uint16_t>(
        groups, [=](double u) { return to_bfloat16(static_cast<float>(step * (0.75 + 0.5 * u))); });
    const auto size = static_cast<std::size_t>(group);
    if (bits == 8) {
      bytes_ = draw.operator()<std::uint8_t>(
          rows * columns, [](double u) { return static_cast<std::uint8_t>(static_cast<int>(u * 255) - 127); });
      Draw::on_all_cores(values.size(), [&](std::size_t i) {
        values[i] = static_cast<float>(static_cast<std::int8_t>(bytes_[i])) * from_bfloat16(scales_[i / size]);
      });
      return;
    }
    zeros_ = draw.operator()<std::uint8_t>(groups, [](double u) { return static_cast<std::uint8_t>(6 + u * 4); });
    bytes_ =
        draw.operator()<std::uint8_t>(rows * columns / 2, [](double u) { return static_cast<std::uint8_t>(u * 256); });
    Draw::on_all_cores(values.size(), [&](std::size_t i) {
      const std::size_t inside = i % size, half = size / 2;
      const int two = bytes_[i / size * half + inside % half];
      const int q = inside < half ? two & 15 : two >> 4;
      values[i] = static_cast<float>(q - zeros_[i / size]) * from_bfloat16(scales_[i / size]);
    });
  }

  std::vector<float> values;

  /// Writes the matrix that passes take, bfloat16, to `to`, and keeps in `memory` what the decode kernel takes of it.
  template <typename Memory>
  QuantizedMatrix upload(Memory& memory, void* to) const {
    if (bits_ == 16) {
      check(cudaMemcpy(to, rounded_.data(), rounded_.size() * 2, cudaMemcpyHostToDevice), "copying a matrix");
      return {};
    }
    const auto keep = [&memory](const auto& array) -> const void* {
      if (array.empty()) return nullptr;
      auto& made = memory.emplace_back((array.size() * sizeof(array[0]) + 1) / 2);
      check(cudaMemcpy(made.data(), array.data(), array.size() * sizeof(array[0]), cudaMemcpyHostToDevice), "copying");
      return made.data();
    };
    const QuantizedMatrix made{keep(bytes_), keep(scales_), keep(zeros_)};
    round_to_bfloat16(made, bits_, group_, rows_, columns_, to);
    return made;
  }

  /// Each value to the nearest bfloat16.
  void round() {
    Draw::on_all_cores(values.size(), [&](std::size_t i) { values[i] = from_bfloat16(to_bfloat16(values[i])); });
  }
  /// Throws Error if a value at `on_card` is not the nearest bfloat16.
  void check_rounded(const void* on_card) const {
    std::vector<std::uint16_t> got(values.size());
    check(cudaMemcpy(got.data(), on_card, got.size() * 2, cudaMemcpyDeviceToHost), "reading a matrix");
    std::atomic<bool> good = true;
    Draw::on_all_cores(values.size(), [&](std::size_t i) {
      // 0 times a scale may be -0 here and 0 there
      if (from_bfloat16(got[i]) != from_bfloat16(to_bfloat16(values[i]))) good = false;
    });
    if (!good) throw Error("a matrix on the card is not rounded to the nearest bfloat16");
  }

 private:
  std::int64_t rows_, columns_;
  int bits_;
  std::int64_t group_;
  std::vector<std::uint16_t> rounded_, scales_;
  std::vector<std::uint8_t> bytes_, zeros_;
};

}  // namespace nanochat_x::cuda
