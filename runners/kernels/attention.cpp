#include "attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

#include "nanochat_x/error.h"

namespace nanochat_x::kernels {
namespace {

// From that many new tokens on, scores are products over blocks of queries.
constexpr std::int64_t kBlocked = 9;

std::int64_t bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

std::int64_t blocks_of(const Attention& a) { return (a.steps + kMostTokens - 1) / kMostTokens; }

float scale_of(const Attention& a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a.width))); }

// Where the query, or the result, of a token begins.
std::int64_t at(const Attention& a, std::int64_t row, std::int64_t step, std::int64_t head) {
  return ((row * a.steps + step) * a.heads + head) * a.width;
}

// The keys that any of the new tokens [begin, end) of a row sees: those of the past, then the new ones.
std::array<PlacedRun, 2> seen(const Attention& a, std::int64_t row, std::int64_t kv_head, std::int64_t begin,
                              std::int64_t end) {
  const std::int64_t behind = a.position == nullptr ? 0 : a.position[row];
  const std::int64_t from = a.window < 0 ? 0 : std::max<std::int64_t>(0, behind + begin - a.window);
  const auto rows = [&](const void* data, std::int64_t length, std::int64_t first) -> const void* {
    const std::int64_t skipped = ((row * a.kv_heads + kv_head) * length + first) * a.width * bytes_of(a.type);
    return static_cast<const std::byte*>(data) + skipped;
  };
  std::array<PlacedRun, 2> runs{};
  if (from < behind) {
    runs[0] = {{rows(a.past_k, a.slots, from), rows(a.past_v, a.slots, from), behind - from}, from};
  }
  const std::int64_t first = std::max<std::int64_t>(0, from - behind);
  runs[1] = {{rows(a.k, a.steps, first), rows(a.v, a.steps, first), end - first}, behind + first};
  return runs;
}

// One token and one KV head, whose query heads see the same keys.
void attend_one(const Attention& a, std::int64_t row, std::int64_t step, std::int64_t kv_head) {
  const std::int64_t group = a.heads / a.kv_heads, offset = at(a, row, step, kv_head * group);
  const auto [past, fresh] = seen(a, row, kv_head, step, step + 1);
  const std::array<Run, 2> runs = {past, fresh};
  attend(a.q + offset, a.width, group, a.width, scale_of(a), runs, a.type, a.out + offset, a.width);
}

// Some tokens of one query head.
void attend_some(const Attention& a, std::int64_t row, std::int64_t head, std::int64_t begin) {
  const std::int64_t count = std::min(kMostTokens, a.steps - begin), offset = at(a, row, begin, head);
  const Tokens tokens{.q = a.q + offset,
                      .q_stride = a.heads * a.width,
                      .count = count,
                      .width = a.width,
                      .scale = scale_of(a),
                      .position = (a.position == nullptr ? 0 : a.position[row]) + begin,
                      .window = a.window,
                      .out = a.out + offset,
                      .out_stride = a.heads * a.width};
  attend_tokens(tokens, seen(a, row, head / (a.heads / a.kv_heads), begin, begin + count), a.type);
}

}  // namespace

std::int64_t Attention::parts() const {
  if (batch < 1 || steps < 1 || heads < 1 || kv_heads < 1 || width < 1 || heads % kv_heads != 0) {
    throw Error("attention takes 1 row, token, head and column or more, and query heads in equal groups");
  }
  return steps < kBlocked ? batch * steps * kv_heads : batch * heads * blocks_of(*this);
}

void Attention::compute(std::int64_t begin, std::int64_t end) const {
  const std::int64_t blocks = blocks_of(*this);
  for (std::int64_t i = begin; i < end; ++i) {
    if (steps < kBlocked) {
      attend_one(*this, i / (steps * kv_heads), i / kv_heads % steps, i % kv_heads);
    } else {
      attend_some(*this, i / (heads * blocks), i / blocks % heads, i % blocks * kMostTokens);
    }
  }
}

}  // namespace nanochat_x::kernels
