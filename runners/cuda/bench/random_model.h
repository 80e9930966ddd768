#pragma once

// A model with random weights, on the card and on the host, in the scales of `nanochat_x init`.

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../decoder.h"
#include "../device_memory.h"
#include "reference.h"

namespace nanochat_x::cuda {

struct RandomShape {
  std::int64_t n_layer, n_embd, n_head, n_kv_head, vocab, positions, short_window;
  bool plain = false;  // generation classic: no lambdas, value embeddings, smear, windows
};

struct RandomModel {
  ReferenceModel host;
  DecoderModel card;
  std::vector<DeviceArray<std::uint16_t>> halves;
  std::vector<DeviceArray<float>> floats;
};

inline std::uint16_t to_bfloat16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16U) & 1U)) >> 16U);
}

inline RandomModel random_model(const RandomShape& s, std::uint64_t seed) {
  RandomModel out;
  std::uint64_t salt = seed << 32U;
  // Uniform in +-bound, by SplitMix64 of the index; on all cores.
  const auto draw = [&salt](std::vector<std::uint16_t>& to, std::int64_t count, double bound) {
    ++salt;
    to.resize(static_cast<std::size_t>(count));
    const std::size_t threads = std::max(1U, std::thread::hardware_concurrency());
    std::vector<std::jthread> pool;
    for (std::size_t t = 0; t < threads; ++t) {
      pool.emplace_back([&to, t, threads, bound, base = salt * 0x9e3779b97f4a7c15U] {
        for (std::size_t i = to.size() * t / threads; i < to.size() * (t + 1) / threads; ++i) {
          std::uint64_t z = base + (i + 1) * 0xbf58476d1ce4e5b9U;
          z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9U;
          z = (z ^ (z >> 27U)) * 0x94d049bb133111ebU;
          const double unit = static_cast<double>((z ^ (z >> 31U)) >> 11U) * 0x1p-53;
          to[i] = to_bfloat16(static_cast<float>(bound * (2 * unit - 1)));
        }
      });
    }
    pool.clear();
  };
  const auto upload = [&out](const std::vector<std::uint16_t>& from) -> const void* {
    return out.halves.emplace_back(std::span<const std::uint16_t>(from)).data();
  };
  const auto upload_floats = [&out](const std::vector<float>& from) -> const float* {
    return out.floats.emplace_back(std::span<const float>(from)).data();
  };
  ReferenceModel& h = out.host;
  DecoderModel& c = out.card;
  const std::int64_t kv_width = s.n_kv_head * 128, mlp = 4 * s.n_embd;
  h.n_embd = c.n_embd = s.n_embd;
  h.n_head = c.n_head = s.n_head;
  h.n_kv_head = c.n_kv_head = s.n_kv_head;
  h.mlp_width = c.mlp_width = mlp;
  h.vocab = c.vocab = s.vocab;
  h.positions = s.positions;
  h.norm_eps = c.norm_eps = 0x1p-23F;
  h.softcap = c.softcap = 15;
  const double of_c = std::sqrt(3.0 / static_cast<double>(s.n_embd)),
               of_mlp = std::sqrt(3.0 / static_cast<double>(mlp));
  draw(h.wte, s.vocab * s.n_embd, 1.4);
  draw(h.lm_head, s.vocab * s.n_embd, 2 * of_c);
  c.wte = upload(h.wte);
  c.lm_head = upload(h.lm_head);
  for (std::int64_t p = 0; p < s.positions; ++p) {
    for (int i = 0; i < 64; ++i) {
      const float angle = static_cast<float>(p) / std::pow(100000.0F, static_cast<float>(2 * i) / 128);
      h.cos.push_back(static_cast<float>(widen(to_bfloat16(std::cos(angle)))));
      h.sin.push_back(static_cast<float>(widen(to_bfloat16(std::sin(angle)))));
    }
  }
  c.cos = upload_floats(h.cos);
  c.sin = upload_floats(h.sin);
  if (!s.plain) {
    h.qk_scale = c.qk_scale = 1.2F;
    h.gate_scale = c.gate_scale = 3;
    h.gate_channels = c.gate_channels = 12;
    h.smear_channels = c.smear_channels = 24;
    h.smear_lambda = c.smear_lambda = 0.5F;
    h.backout_lambda = c.backout_lambda = 0.2F;
    h.backout_layer = c.backout_layer = s.n_layer / 2;
    for (std::int64_t i = 0; i < 24; ++i) h.smear_gate.push_back(0.3F * std::sin(static_cast<float>(7 * i + 1)));
    c.smear_gate = upload_floats(h.smear_gate);
  }
  for (std::int64_t i = 0; i < s.n_layer; ++i) {
    ReferenceLayer& layer = h.layers.emplace_back();
    DecoderLayer& card = c.layers.emplace_back();
    draw(layer.c_q, s.n_embd * s.n_embd, of_c);
    draw(layer.c_k, kv_width * s.n_embd, of_c);
    draw(layer.c_v, kv_width * s.n_embd, of_c);
    draw(layer.c_proj, s.n_embd * s.n_embd, of_c);
    draw(layer.c_fc, mlp * s.n_embd, of_c);
    draw(layer.mlp_c_proj, s.n_embd * mlp, of_mlp);
    std::vector<std::uint16_t> qkv = layer.c_q;
    qkv.insert(qkv.end(), layer.c_k.begin(), layer.c_k.end());
    qkv.insert(qkv.end(), layer.c_v.begin(), layer.c_v.end());
    card.c_q = upload(qkv);
    card.c_k = static_cast<const std::uint16_t*>(card.c_q) + layer.c_q.size();
    card.c_v = static_cast<const std::uint16_t*>(card.c_k) + layer.c_k.size();
    card.c_proj = upload(layer.c_proj);
    card.c_fc = upload(layer.c_fc);
    card.mlp_c_proj = upload(layer.mlp_c_proj);
    if (s.plain) continue;
    const float depth = static_cast<float>(i) / static_cast<float>(s.n_layer);
    layer.resid_lambda = card.resid_lambda = 1.15F - 0.1F * depth;
    layer.x0_lambda = card.x0_lambda = 0.2F - 0.15F * depth;
    layer.window = card.window = i % 4 == 3 || i == s.n_layer - 1 ? s.positions : s.short_window;
    if (i % 2 == (s.n_layer - 1) % 2) {
      draw(layer.value_embed, s.vocab * kv_width, 1.7);
      card.value_embed = upload(layer.value_embed);
      for (std::int64_t j = 0; j < s.n_kv_head * 12; ++j) {
        layer.ve_gate.push_back(0.5F * std::sin(static_cast<float>(5 * j + i)));
      }
      card.ve_gate = upload_floats(layer.ve_gate);
    }
  }
  return out;
}

}  // namespace nanochat_x::cuda
