#pragma once

// The forward pass of one token in float64 on the CPU, over the same weights, those in 8 and 4 bits as they are meant:
// what the kernels are held against. Written from docs/generations.md and model.py, not from the kernel.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <span>
#include <thread>
#include <vector>

namespace nanochat_x::cuda {

struct ReferenceLayer {
  std::vector<float> c_q, c_k, c_v, c_proj, c_fc, mlp_c_proj;
  std::vector<std::uint16_t> value_embed;  // bfloat16
  std::vector<float> ve_gate;
  float resid_lambda = 1, x0_lambda = 0;
  std::int64_t window = -1;
};

struct ReferenceModel {
  std::int64_t n_embd = 0, n_head = 0, n_kv_head = 0, mlp_width = 0, vocab = 0, positions = 0;
  double norm_eps = 0, qk_scale = 1, softcap = 0, gate_scale = 0, smear_lambda = 0, backout_lambda = 0;
  std::int64_t gate_channels = 0, smear_channels = 0, backout_layer = -1;
  std::vector<std::uint16_t> wte;  // bfloat16
  std::vector<float> lm_head, smear_gate, cos, sin;
  std::vector<ReferenceLayer> layers;
};

inline double widen(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16U); }

/// One sequence. keys[layer], values[layer]: [position][n_kv_head * 128].
class Reference {
 public:
  using Vector = std::vector<double>;

  explicit Reference(const ReferenceModel& model) : m_(model), keys(model.layers.size()), values(model.layers.size()) {}

  /// Logits after `token`, behind `previous`.
  Vector step(std::int64_t token, std::int64_t previous) {
    const std::int64_t position = static_cast<std::int64_t>(keys[0].size());
    Vector x = normed(row(m_.wte, token, m_.n_embd), m_.n_embd);
    if (m_.smear_channels > 0 && position > 0) {
      double gate = 0;
      for (std::int64_t i = 0; i < m_.smear_channels; ++i) gate += x[at(i)] * m_.smear_gate[at(i)];
      gate = m_.smear_lambda / (1 + std::exp(-gate));
      const Vector before = normed(row(m_.wte, previous, m_.n_embd), m_.n_embd);
      for (std::size_t i = 0; i < x.size(); ++i) x[i] += gate * before[i];
    }
    const Vector x0 = x;
    Vector middle = x;
    for (std::size_t i = 0; i < m_.layers.size(); ++i) {
      layer(i, token, position, x, x0);
      if (static_cast<std::int64_t>(i) == m_.backout_layer) middle = x;
    }
    if (m_.backout_layer >= 0) {
      for (std::size_t i = 0; i < x.size(); ++i) x[i] -= m_.backout_lambda * middle[i];
    }
    Vector logits = times(m_.lm_head, normed(x, m_.n_embd));
    if (m_.softcap > 0) {
      for (double& logit : logits) logit = m_.softcap * std::tanh(logit / m_.softcap);
    }
    return logits;
  }

 private:
  static std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

  static Vector row(const std::vector<std::uint16_t>& table, std::int64_t index, std::int64_t width) {
    Vector out(at(width));
    for (std::int64_t i = 0; i < width; ++i) out[at(i)] = widen(table[at(index * width + i)]);
    return out;
  }

  // Each piece of `width` by itself.
  Vector normed(Vector x, std::int64_t width) const {
    for (std::size_t begin = 0; begin < x.size(); begin += at(width)) {
      double squares = 0;
      for (std::int64_t i = 0; i < width; ++i) squares += x[begin + at(i)] * x[begin + at(i)];
      const double factor = 1 / std::sqrt(squares / static_cast<double>(width) + m_.norm_eps);
      for (std::int64_t i = 0; i < width; ++i) x[begin + at(i)] *= factor;
    }
    return x;
  }

  // In as many sums as keep a processor busy: with one, each addition waits for the last.
  template <typename Value>
  static double dot(const Value* a, const double* b, std::size_t count) {
    constexpr std::size_t kSums = 8;
    double sums[kSums] = {}, sum = 0;
    std::size_t i = 0;
    for (; i + kSums <= count; i += kSums) {
      for (std::size_t j = 0; j < kSums; ++j) sums[j] += a[i + j] * b[i + j];
    }
    for (; i < count; ++i) sum += a[i] * b[i];
    for (const double part : sums) sum += part;
    return sum;
  }

  static Vector times(const std::vector<float>& matrix, const Vector& x) {
    const std::size_t rows = matrix.size() / x.size();
    Vector out(rows);
    const std::size_t threads = rows * x.size() < 1'000'000 ? 1 : std::max(1U, std::thread::hardware_concurrency());
    const auto part = [&](std::size_t t) {
      for (std::size_t r = rows * t / threads; r < rows * (t + 1) / threads; ++r) {
        out[r] = dot(matrix.data() + r * x.size(), x.data(), x.size());
      }
    };
    std::vector<std::jthread> pool;
    for (std::size_t t = 1; t < threads; ++t) pool.emplace_back(part, t);
    part(0);
    pool.clear();  // waits
    return out;
  }

  // Rotary embedding, norm and scale of heads of 128.
  Vector prepared(Vector heads, std::int64_t position) const {
    for (std::size_t head = 0; head < heads.size(); head += 128) {
      for (std::size_t i = 0; i < 64; ++i) {
        const double a = heads[head + i], b = heads[head + 64 + i];
        const double c = m_.cos[at(position) * 64 + i], s = m_.sin[at(position) * 64 + i];
        heads[head + i] = a * c + b * s;
        heads[head + 64 + i] = b * c - a * s;
      }
    }
    heads = normed(std::move(heads), 128);
    for (double& value : heads) value *= m_.qk_scale;
    return heads;
  }

  void layer(std::size_t index, std::int64_t token, std::int64_t position, Vector& x, const Vector& x0) {
    const ReferenceLayer& w = m_.layers[index];
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = w.resid_lambda * x[i] + w.x0_lambda * x0[i];
    const Vector h = normed(x, m_.n_embd);
    const Vector q = prepared(times(w.c_q, h), position);
    Vector v = times(w.c_v, h);
    if (!w.value_embed.empty()) {
      const Vector embed = row(w.value_embed, token, m_.n_kv_head * 128);
      for (std::int64_t head = 0; head < m_.n_kv_head; ++head) {
        double gate = 0;
        for (std::int64_t i = 0; i < m_.gate_channels; ++i)
          gate += h[at(i)] * w.ve_gate[at(head * m_.gate_channels + i)];
        gate = m_.gate_scale / (1 + std::exp(-gate));
        for (std::int64_t i = 0; i < 128; ++i) v[at(head * 128 + i)] += gate * embed[at(head * 128 + i)];
      }
    }
    keys[index].push_back(prepared(times(w.c_k, h), position));
    values[index].push_back(v);
    const Vector attended = times(w.c_proj, attend(index, q, position));
    for (std::size_t i = 0; i < x.size(); ++i) x[i] += attended[i];
    Vector inside = times(w.c_fc, normed(x, m_.n_embd));
    for (double& value : inside) value = value > 0 ? value * value : 0;
    const Vector out = times(w.mlp_c_proj, inside);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] += out[i];
  }

  Vector attend(std::size_t index, const Vector& q, std::int64_t position) const {
    const std::int64_t window = m_.layers[index].window;
    const std::int64_t first = window < 0 ? 0 : std::max<std::int64_t>(0, position - window);
    Vector out(q.size());
    for (std::int64_t head = 0; head < m_.n_head; ++head) {
      const std::int64_t kv = head / (m_.n_head / m_.n_kv_head) * 128;
      Vector weights;
      for (std::int64_t key = first; key <= position; ++key) {
        const double score = dot(q.data() + at(head * 128), keys[index][at(key)].data() + at(kv), 128);
        weights.push_back(score / std::sqrt(128.0));
      }
      const double largest = *std::max_element(weights.begin(), weights.end());
      double total = 0;
      for (double& weight : weights) total += weight = std::exp(weight - largest);
      for (double& weight : weights) weight /= total;
      for (std::int64_t key = first; key <= position; ++key) {
        for (std::int64_t i = 0; i < 128; ++i) {
          out[at(head * 128 + i)] += weights[at(key - first)] * values[index][at(key)][at(kv + i)];
        }
      }
    }
    return out;
  }

  const ReferenceModel& m_;

 public:
  std::vector<std::vector<Vector>> keys, values;
};

}  // namespace nanochat_x::cuda
