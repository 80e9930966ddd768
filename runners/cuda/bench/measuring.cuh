#pragma once

// What the benches of kernels share: how far logits may be off, how long work of the card takes, what its memory gives.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "../check.h"
#include "../device_memory.h"

namespace nanochat_x::cuda {

// The largest relative error (root of the mean square) of the logits that is no mistake: operands of the products, keys
// and values are rounded to bfloat16 (2^-9 each) once or twice a layer, and roundings of different layers partly
// cancel.
inline constexpr double kAllowed = 0.01;

// Relative to what is wanted, root of the mean square.
inline double difference(std::span<const float> got, const std::vector<double>& wanted) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double d = got[i] - wanted[i];
    error += d * d;
    norm += wanted[i] * wanted[i];
  }
  return std::sqrt(error / norm);
}

// Seconds of each of `repeats` times, ascending; once before that for nothing.
template <typename Work>
std::vector<double> times_of(int repeats, Work work) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<double> times;
  work();
  for (int i = 0; i < repeats; ++i) {
    check(cudaEventRecord(begin), "event");
    work();
    check(cudaEventRecord(end), "event");
    check(cudaEventSynchronize(end), "waiting");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "time");
    times.push_back(ms / 1e3);
  }
  std::sort(times.begin(), times.end());
  return times;
}

__global__ void read_all(const uint4* data, std::size_t count, unsigned* out) {
  unsigned sum = 0;
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  std::size_t i = blockIdx.x * static_cast<std::size_t>(blockDim.x) + threadIdx.x;
  for (; i + 7 * stride < count; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < count; i += stride) sum ^= data[i].x;
  if (sum == 0x12345678U) *out = sum;
}

// Bytes a second.
inline double read_bandwidth() {
  const std::size_t bytes = std::size_t{4} << 30U;
  DeviceArray<std::uint16_t> data(bytes / 2);
  DeviceArray<unsigned> out(1);
  double best = 0;
  for (const int blocks : {132 * 4, 132 * 8, 132 * 16}) {
    const auto times = times_of(
        10, [&] { read_all<<<blocks, 256>>>(reinterpret_cast<const uint4*>(data.data()), bytes / 16, out.data()); });
    best = std::max(best, static_cast<double>(bytes) / times[times.size() / 2]);
  }
  return best;
}

}  // namespace nanochat_x::cuda
