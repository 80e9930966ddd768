#pragma once

// A model with random weights, on the card and on the host, in the scales of `nanochat_x init`.

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../decoder.h"
#include "../device_memory.h"
#include "random_matrix.h"
#include "reference.h"

namespace nanochat_x::cuda {

struct RandomShape {
  std::int64_t n_layer, n_embd, n_head, n_kv_head, vocab, positions, short_window;
  bool plain = false;  // generation classic: no lambdas, value embeddings, smear, windows
  int bits = 16;       // of a weight of a matrix: 16, 8 or 4
  std::int64_t quant_group = 32;
  bool rounded = false;  // on the host such matrices are as passes take them: rounded to bfloat16
};

struct RandomModel {
  ReferenceModel host;
  DecoderModel card;
  std::vector<DeviceArray<std::uint16_t>> halves;
  std::vector<DeviceArray<float>> floats;
};

inline RandomModel random_model(const RandomShape& s, std::uint64_t seed) {
  RandomModel out;
  Draw draw(seed);
  const auto upload = [&out](const std::vector<std::uint16_t>& from) -> const void* {
    return out.halves.emplace_back(std::span<const std::uint16_t>(from)).data();
  };
  const auto upload_floats = [&out](const std::vector<float>& from) -> const float* {
    return out.floats.emplace_back(std::span<const float>(from)).data();
  };
  // On the host, and at `to` on the card.
  const auto matrix = [&](std::vector<float>& host, void* to, std::int64_t rows, std::int64_t columns, double bound) {
    RandomMatrix made(draw, rows, columns, bound, s.bits, s.quant_group);
    const QuantizedMatrix quantized = made.upload(out.halves, to);
    if (s.bits != 16) made.check_rounded(to);
    if (s.rounded) made.round();
    host = std::move(made.values);
    return quantized;
  };
  const auto room = [&out](std::int64_t count) {
    return out.halves.emplace_back(static_cast<std::size_t>(count)).data();
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
  c.bits = s.bits;
  c.quant_group = s.quant_group;
  h.wte = draw.uniform(s.vocab * s.n_embd, 1.4);
  c.wte = upload(h.wte);
  std::uint16_t* lm_head = room(s.vocab * s.n_embd);
  c.lm_head = lm_head;
  c.quantized_head = matrix(h.lm_head, lm_head, s.vocab, s.n_embd, 2 * of_c);
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
    // c_q, c_k and c_v one behind the other
    std::uint16_t* qkv = room((s.n_embd + 2 * kv_width) * s.n_embd);
    std::uint16_t* const keys = qkv + s.n_embd * s.n_embd;
    std::uint16_t* const values = keys + kv_width * s.n_embd;
    std::uint16_t* c_proj = room(s.n_embd * s.n_embd);
    std::uint16_t* c_fc = room(mlp * s.n_embd);
    std::uint16_t* mlp_c_proj = room(mlp * s.n_embd);
    card.c_q = qkv;
    card.c_k = keys;
    card.c_v = values;
    card.c_proj = c_proj;
    card.c_fc = c_fc;
    card.mlp_c_proj = mlp_c_proj;
    card.quantized.c_q = matrix(layer.c_q, qkv, s.n_embd, s.n_embd, of_c);
    card.quantized.c_k = matrix(layer.c_k, keys, kv_width, s.n_embd, of_c);
    card.quantized.c_v = matrix(layer.c_v, values, kv_width, s.n_embd, of_c);
    card.quantized.c_proj = matrix(layer.c_proj, c_proj, s.n_embd, s.n_embd, of_c);
    card.quantized.c_fc = matrix(layer.c_fc, c_fc, mlp, s.n_embd, of_c);
    card.quantized.mlp_c_proj = matrix(layer.mlp_c_proj, mlp_c_proj, s.n_embd, mlp, of_mlp);
    if (s.plain) continue;
    const float depth = static_cast<float>(i) / static_cast<float>(s.n_layer);
    layer.resid_lambda = card.resid_lambda = 1.15F - 0.1F * depth;
    layer.x0_lambda = card.x0_lambda = 0.2F - 0.15F * depth;
    layer.window = card.window = i % 4 == 3 || i == s.n_layer - 1 ? s.positions : s.short_window;
    if (i % 2 == (s.n_layer - 1) % 2) {
      layer.value_embed = draw.uniform(s.vocab * kv_width, 1.7);
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
