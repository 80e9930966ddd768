#include "decode_plan.h"

#include <algorithm>

#include "entries.h"

namespace nanochat_x::cuda {
namespace {

constexpr int kUnitHeads = kHiddenUnit / kHeadDim;

// What the ring must hold at least: packed rows of n_embd columns are given back a pass at a time.
template <WeightFormat FORMAT>
int least_ring(const DecoderModel& model, const std::vector<ClusterShare>& shares) {
  using E = Entries<FORMAT>;
  const int wide = E::wide_bytes(static_cast<int>(model.n_embd));
  int most = FORMAT == WeightFormat::kBfloat16 ? 3 * wide : kPassRows / E::kWideRows * wide;
  for (const ClusterShare& share : shares) {
    const int group = static_cast<int>(model.n_head / model.n_kv_head);
    for (const int width : {share.hidden(), share.kv_heads() * group * kHeadDim}) {
      most = std::max(most, 2 * E::narrow_bytes(width));
    }
  }
  return most;
}

}  // namespace

std::vector<ClusterShare> deal_out(const DecoderModel& model, int clusters) {
  const int kv_heads = static_cast<int>(model.n_kv_head), with_heads = std::min(clusters, kv_heads);
  const int group = static_cast<int>(model.n_head / model.n_kv_head);
  std::vector<ClusterShare> shares(static_cast<std::size_t>(clusters));
  std::vector<int> units(shares.size(), 1), weight(shares.size());
  for (int c = 0; c < clusters; ++c) {
    ClusterShare& share = shares[static_cast<std::size_t>(c)];
    share.kv_begin = kv_heads * std::min(c, with_heads) / with_heads;
    share.kv_end = kv_heads * std::min(c + 1, with_heads) / with_heads;
    // In heads: a query head's rows of c_q and columns of c_proj are a half of what 128 of the inside take of the MLP.
    weight[static_cast<std::size_t>(c)] = kUnitHeads + share.kv_heads() * (group + 1);
  }
  for (std::int64_t left = model.mlp_width / kHiddenUnit - clusters; left > 0; --left) {
    const auto least = std::ranges::min_element(weight) - weight.begin();
    weight[static_cast<std::size_t>(least)] += kUnitHeads;
    ++units[static_cast<std::size_t>(least)];
  }
  int begin = 0;
  for (std::size_t c = 0; c < shares.size(); ++c) {
    shares[c].hidden_begin = begin;
    begin += units[c] * kHiddenUnit;
    shares[c].hidden_end = begin;
  }
  return shares;
}

BlockLayout block_layout(const DecoderModel& model, const std::vector<ClusterShare>& shares, WeightFormat format,
                         int rows, int fixed_bytes, int shared_bytes) {
  const int width = static_cast<int>(model.n_embd), group = static_cast<int>(model.n_head / model.n_kv_head);
  int most_hidden = 0, most_heads = 0;
  for (const ClusterShare& share : shares) {
    most_hidden = std::max(most_hidden, share.hidden());
    most_heads = std::max(most_heads, share.kv_heads() * group);
  }
  int next = 0;
  const auto take = [&next](int bytes, int alignment = 128) {
    const int at = (next + alignment - 1) / alignment * alignment;
    next = at + bytes;
    return at;
  };
  BlockLayout layout{};
  take(fixed_bytes);
  layout.rotary = take(rows * kRotaryBytes);
  layout.sums = take(sums_bytes(rows));
  layout.x = take(rows * vector_bytes(width));
  layout.mlp_x = take(rows * vector_bytes(width));
  layout.qkv = take(rows * 4 * (group + 2) * kHeadDim);
  layout.parts = take(rows * 4 * group * kRanks * (kHeadDim + 1));
  layout.attended = take(rows * vector_bytes(most_heads * kHeadDim));
  layout.hidden = take(rows * vector_bytes(most_hidden));
  layout.ring = take(0, kEntryAlignment);
  layout.ring_bytes = (shared_bytes - layout.ring) / kEntryAlignment * kEntryAlignment;
  const int least = format == WeightFormat::kBfloat16 ? least_ring<WeightFormat::kBfloat16>(model, shares)
                    : format == WeightFormat::kInt8   ? least_ring<WeightFormat::kInt8>(model, shares)
                                                      : least_ring<WeightFormat::kInt4>(model, shares);
  if (layout.ring_bytes < least) layout.ring_bytes = 0;
  return layout;
}

}  // namespace nanochat_x::cuda
