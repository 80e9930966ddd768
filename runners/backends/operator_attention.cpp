#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/softmax.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "operator_tensors.h"
#include "operators.h"

namespace nanochat_x::operators {
namespace {

// From that many new tokens on, scores are matrix products over blocks of queries.
constexpr std::int64_t kBlocked = 9;
constexpr std::int64_t kQueries = 64;  // of a block: their scores over a context of 2,048 are half a MiB

// Sizes and memory of one call.
struct Call {
  std::int64_t batch, steps, heads, kv_heads, width, slots, window;
  at::ScalarType type;
  const float* q;
  const std::byte *k, *v, *past_k, *past_v;
  const std::int64_t* position;  // null: no past
  float* out;
  float scale;
  std::int64_t row_bytes;  // of one key

  std::int64_t behind(std::int64_t row) const { return position == nullptr ? 0 : position[row]; }
  // First position that the query at `at` sees.
  std::int64_t first(std::int64_t at) const { return window < 0 ? 0 : std::max<std::int64_t>(0, at - window); }
  const float* query(std::int64_t row, std::int64_t step, std::int64_t head) const {
    return q + ((row * steps + step) * heads + head) * width;
  }
  float* result(std::int64_t row, std::int64_t step, std::int64_t head) const {
    return out + ((row * steps + step) * heads + head) * width;
  }
  const std::byte* rows_of(const std::byte* data, std::int64_t row, std::int64_t kv_head, std::int64_t length,
                           std::int64_t at) const {
    return data + ((row * kv_heads + kv_head) * length + at) * row_bytes;
  }
};

// One token and one KV head, whose query heads see the same keys.
void attend_token(const Call& c, std::int64_t row, std::int64_t step, std::int64_t kv_head) {
  const std::int64_t position = c.behind(row), group = c.heads / c.kv_heads;
  const std::int64_t from = c.first(position + step);  // in the row
  const std::int64_t past = std::max<std::int64_t>(0, position - from),
                     first_new = std::max<std::int64_t>(0, from - position);
  std::array<kernels::Run, 2> runs{};
  if (past > 0) {
    runs[0] = {c.rows_of(c.past_k, row, kv_head, c.slots, from), c.rows_of(c.past_v, row, kv_head, c.slots, from),
               past};
  }
  runs[1] = {c.rows_of(c.k, row, kv_head, c.steps, first_new), c.rows_of(c.v, row, kv_head, c.steps, first_new),
             step + 1 - first_new};
  kernels::attend(c.query(row, step, kv_head * group), c.width, group, c.width, c.scale, runs, type_of(c.type),
                  c.result(row, step, kv_head * group), c.width);
}

// A block of tokens of one row and head, over the keys that any of them sees.
class Block {
 public:
  Block(const Call& call, std::int64_t row, std::int64_t head, std::int64_t begin)
      : c_(call),
        row_(row),
        head_(head),
        begin_(begin),
        count_(std::min(kQueries, call.steps - begin)),
        position_(call.behind(row)),
        first_past_(std::min(position_, call.first(position_ + begin))),
        first_new_(std::max<std::int64_t>(0, call.first(position_ + begin) - position_)),
        past_(position_ - first_past_),
        fresh_(begin + count_ - first_new_) {}

  void attend() const {
    const std::int64_t kv_head = head_ / (c_.heads / c_.kv_heads);
    const at::Tensor queries = strided(const_cast<float*>(c_.query(row_, begin_, head_)));
    at::Tensor scores = at::empty({count_, past_ + fresh_}, queries.options());
    at::Tensor of_past = scores.narrow(1, 0, past_), of_new = scores.narrow(1, past_, fresh_);
    const auto rows = [&](const std::byte* data, std::int64_t length, std::int64_t first, std::int64_t count) {
      return float_rows(c_.rows_of(data, row_, kv_head, length, first), c_.type, count, c_.width);
    };
    if (past_ > 0)
      at::addmm_out(of_past, of_past, queries, rows(c_.past_k, c_.slots, first_past_, past_).t(), 0, c_.scale);
    at::addmm_out(of_new, of_new, queries, rows(c_.k, c_.steps, first_new_, fresh_).t(), 0, c_.scale);
    mask(scores);
    const at::Tensor weights = at::softmax(scores, -1);
    at::Tensor out = strided(c_.result(row_, begin_, head_));
    at::mm_out(out, weights.narrow(1, past_, fresh_), rows(c_.v, c_.steps, first_new_, fresh_));
    if (past_ > 0) out.addmm_(weights.narrow(1, 0, past_), rows(c_.past_v, c_.slots, first_past_, past_));
  }

 private:
  // The block's tokens of one head, [count, D].
  at::Tensor strided(float* data) const {
    return at::from_blob(data, {count_, c_.width}, {c_.heads * c_.width, 1}, at::TensorOptions(at::kFloat));
  }

  // What a query does not see gets no weight: keys before its window and tokens after it.
  void mask(at::Tensor& scores) const {
    const std::int64_t columns = past_ + fresh_;
    float* row = scores.mutable_data_ptr<float>();
    for (std::int64_t i = 0; i < count_; ++i, row += columns) {
      const std::int64_t at = position_ + begin_ + i, first = position_ - past_;
      // Column j < past is the key at position first + j; column past + j that of new token first_new + j.
      const std::int64_t from = c_.first(at);
      const std::int64_t hidden_past = std::clamp<std::int64_t>(from - first, 0, past_);
      std::fill_n(row, hidden_past, -std::numeric_limits<float>::infinity());
      const std::int64_t hidden_new = std::clamp<std::int64_t>(from - position_ - first_new_, 0, fresh_);
      std::fill_n(row + past_, hidden_new, -std::numeric_limits<float>::infinity());
      const std::int64_t seen = begin_ + i + 1 - first_new_;
      std::fill(row + past_ + seen, row + columns, -std::numeric_limits<float>::infinity());
    }
  }

  const Call& c_;
  std::int64_t row_, head_, begin_, count_, position_;
  std::int64_t first_past_, first_new_;  // slots and new tokens from which on any query of the block sees keys
  std::int64_t past_, fresh_;            // how many there are
};

void check_shapes(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<Past>& past) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && k.size(0) == q.size(0) &&
                  k.size(2) == q.size(1) && k.size(3) == q.size(3) && k.size(1) > 0 && q.size(2) % k.size(1) == 0,
              "nanochat_x::attention: q ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(), " do not fit together");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
              "nanochat_x::attention: q, k and v must have one dtype");
  if (!past) return;
  const auto fits = [&](const at::Tensor& t) {
    return t.dim() == 4 && t.size(0) == k.size(0) && t.size(1) == k.size(1) && t.size(3) == k.size(3) &&
           t.scalar_type() == k.scalar_type();
  };
  TORCH_CHECK(fits(past->k) && fits(past->v) && past->k.size(2) == past->v.size(2), "nanochat_x::attention: a past of ",
              past->k.sizes(), " and ", past->v.sizes(), " does not fit k ", k.sizes());
  const at::Tensor& position = past->position;
  TORCH_CHECK(position.scalar_type() == at::kLong && position.dim() == 1 && position.size(0) == q.size(0),
              "nanochat_x::attention: position is ", position.scalar_type(), position.sizes());
  const std::int64_t* at = position.const_data_ptr<std::int64_t>();
  TORCH_CHECK(std::all_of(at, at + q.size(0), [&](std::int64_t p) { return 0 <= p && p <= past->k.size(2); }),
              "nanochat_x::attention: a position is not within the cache's ", past->k.size(2), " slots");
}

}  // namespace

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<Past>& past,
                     std::int64_t window) {
  std::optional<Past> whole;
  if (past) whole = Past{past->k.contiguous(), past->v.contiguous(), past->position.contiguous()};
  check_shapes(q, k, v, whole);
  (void)type_of(q.scalar_type());  // one that the kernels have
  const at::Tensor queries = q.contiguous().to(at::kFloat), keys = k.contiguous(), values = v.contiguous();
  at::Tensor out = at::empty(queries.sizes(), queries.options());
  const auto data = [](const at::Tensor& t) { return static_cast<const std::byte*>(t.const_data_ptr()); };
  const Call call{.batch = q.size(0),
                  .steps = q.size(1),
                  .heads = q.size(2),
                  .kv_heads = k.size(1),
                  .width = q.size(3),
                  .slots = whole ? whole->k.size(2) : 0,
                  .window = window,
                  .type = k.scalar_type(),
                  .q = queries.const_data_ptr<float>(),
                  .k = data(keys),
                  .v = data(values),
                  .past_k = whole ? data(whole->k) : nullptr,
                  .past_v = whole ? data(whole->v) : nullptr,
                  .position = whole ? whole->position.const_data_ptr<std::int64_t>() : nullptr,
                  .out = out.mutable_data_ptr<float>(),
                  .scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(q.size(3)))),
                  .row_bytes = q.size(3) * static_cast<std::int64_t>(k.element_size())};
  if (call.steps < kBlocked) {
    in_parallel(call.batch * call.steps * call.kv_heads, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        attend_token(call, i / (call.steps * call.kv_heads), i / call.kv_heads % call.steps, i % call.kv_heads);
      }
    });
  } else {
    const std::int64_t blocks = (call.steps + kQueries - 1) / kQueries;
    in_parallel(call.batch * call.heads * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        Block(call, i / (call.heads * blocks), i / blocks % call.heads, i % blocks * kQueries).attend();
      }
    });
  }
  return out.view({call.batch, call.steps, call.heads * call.width}).to(q.scalar_type());
}

}  // namespace nanochat_x::operators
