#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

/// Products and attention of one-token steps and small batches, for CPUs: what reads the weights once and is bounded by
/// how fast memory can be read. Instructions (AVX2, AVX-512, NEON; without them plain ones) are chosen at run time.
///
/// No function starts threads: a caller splits the rows [begin, end) of the weight matrix between its own, which may
/// call at once. Pointers need the alignment of their elements and no more. What is NaN or infinite in the arguments is
/// so in the results, where the arithmetic says it. All throw nanochat_x::Error for sizes that the parameters exclude;
/// memory is the caller's word.
namespace nanochat_x::kernels {

/// How weights, keys or values are stored. The 16-bit types are given by their bits, as std::uint16_t.
enum class Type { float32, bfloat16, float16 };

/// Of x in one call.
inline constexpr std::int64_t kMostRows = 16;

/// y[m * y_stride + n] = sum over k of x[m * K + k] * w[n * K + k], for n in [begin, end) and m in [0, M).
/// x: float32 [M, K], 1 <= M <= kMostRows, K >= 1. w: `type` [N, K]. Products and sums are float32.
void linear(const float* x, std::int64_t M, std::int64_t K, const void* w, Type type, float* y, std::int64_t y_stride,
            std::int64_t begin, std::int64_t end);

/// `linear` for any number of rows of x, M >= 1. Weights are rearranged for all of them, which pays from about
/// kMostRows on. A row of y does not depend on the other rows of x. Callers had better split rows of w at multiples of
/// kPanelRows.
void matmul(const float* x, std::int64_t M, std::int64_t K, const void* w, Type type, float* y, std::int64_t y_stride,
            std::int64_t begin, std::int64_t end);

/// A multiple of the rows of w that `matmul` rearranges at a time, with any instruction set.
inline constexpr std::int64_t kPanelRows = 48;

/// Of columns of a compact matrix: K is a multiple of it.
inline constexpr std::int64_t kCompactBlock = 32;

/// A matrix [N, K] of float32 in fewer bytes, without loss; nanochat_x/compact.py has the format.
struct Compact {
  std::int64_t K;
  const std::uint8_t* blocks;  // [N, row_bytes()], from an even address on
  const std::uint8_t* bases;   // [N]
  const std::int32_t* starts;  // [N + 1]
  const std::int32_t* columns;
  const float* values;
  std::int64_t exceptions;

  std::int64_t row_bytes() const { return K / 2 * 7; }
};

/// `linear` with a compact matrix. An exception's product is added to that of what stands in its place: where x is
/// infinite, NaN may come of it. Also throws for exceptions that are none of w's.
void linear_compact(const float* x, std::int64_t M, const Compact& w, float* y, std::int64_t y_stride,
                    std::int64_t begin, std::int64_t end);

/// `matmul` with a compact matrix.
void matmul(const float* x, std::int64_t M, const Compact& w, float* y, std::int64_t y_stride, std::int64_t begin,
            std::int64_t end);

/// Rows [begin, end) of a compact matrix as float32, exactly.
void widen_compact(const Compact& w, float* out, std::int64_t begin, std::int64_t end);

/// `linear` with w[n, k] = q[n, k] * scale[n, k / group], which is computed without rounding.
/// q: int8 [N, K]. scales: bfloat16 bits [N, K / group]. group: a multiple of 8 from 16 on that divides K.
void linear_int8(const float* x, std::int64_t M, std::int64_t K, const std::int8_t* q, const std::uint16_t* scales,
                 std::int64_t group, float* y, std::int64_t y_stride, std::int64_t begin, std::int64_t end);

/// `linear` with w[n, k] = (q[n, k] - zero[n, k / group]) * scale[n, k / group], which is computed without rounding.
/// q: 0 to 15, two a byte, [N, K / 2] bytes: of the values of a group, byte i holds value i in its low half and value
/// i + group / 2 in its high half. scales: bfloat16 bits [N, K / group]. zeros: uint8, 0 to 15, [N, K / group].
/// group: as for `linear_int8`.
void linear_int4(const float* x, std::int64_t M, std::int64_t K, const std::uint8_t* q, const std::uint16_t* scales,
                 const std::uint8_t* zeros, std::int64_t group, float* y, std::int64_t y_stride, std::int64_t begin,
                 std::int64_t end);

/// A row of x in integers of 16 bits, for one product: x[k] is about q()[k] * scales()[k / group].
class QuantizedRow {
 public:
  /// How the integers lie in memory: as they are, or in bytes, high and low, for AVX-512 VNNI.
  enum class Layout { words, bytes };

  /// A cache line of bytes.
  struct alignas(64) Line {
    std::int8_t bytes[64];
  };

  /// Whether there is a product of that layout with weights of `bits`, 8 or 4, in such groups on this machine.
  static bool takes(Layout layout, int bits, std::int64_t group);

  /// The faster layout of those that there are.
  static std::optional<Layout> best(int bits, std::int64_t group);

  /// x, float32 [K], each value to the nearest of 65,279 steps between its group's largest magnitude and its negative:
  /// as near as 2^-15.99 of that magnitude. bits, group: of the weights; the layout must take them.
  QuantizedRow(const float* x, std::int64_t K, std::int64_t group, int bits, Layout layout);

  /// False if a value is NaN or infinite: there are no integers then, and no product.
  bool finite() const { return finite_; }

  std::int64_t size() const { return static_cast<std::int64_t>(q_.size()); }
  std::int64_t group() const { return group_; }
  int bits() const { return bits_; }
  Layout layout() const { return layout_; }
  const std::int16_t* q() const { return q_.data(); }
  const float* scales() const { return scales_.data(); }
  /// scales()[g] times the sum of the integers of group g.
  const float* sums() const { return sums_.data(); }
  /// For Layout::bytes; see linear_bytes.cpp.
  const Line* lines() const { return lines_.data(); }

 private:
  std::int64_t group_;
  int bits_;
  Layout layout_;
  std::vector<std::int16_t> q_;
  std::vector<float> scales_, sums_;
  std::vector<Line> lines_;
  bool finite_;
};

/// `linear_int8` and `linear_int4` of one row of x in integers, whose K and group are the weights'. What is summed in a
/// group is exact; groups are added in float32.
void linear_int8(const QuantizedRow& x, const std::int8_t* q, const std::uint16_t* scales, float* y, std::int64_t begin,
                 std::int64_t end);
void linear_int4(const QuantizedRow& x, const std::uint8_t* q, const std::uint16_t* scales, const std::uint8_t* zeros,
                 float* y, std::int64_t begin, std::int64_t end);

/// Rows of x in integers of 16 bits, as those of a `QuantizedRow`, for one product of many.
class QuantizedRows {
 public:
  /// Rows that lie together: callers split them at multiples of it.
  static constexpr std::int64_t kTogether = 16;

  /// Of a group, those of the rows that lie together.
  struct alignas(64) Scales {
    float of_row[kTogether];
  };

  /// Whether there are products of them with weights in such groups on this machine: AVX-512 VNNI.
  static bool takes(std::int64_t group);

  /// Room for rows of x [M, K]. group: of the weights; it must be taken.
  QuantizedRows(std::int64_t M, std::int64_t K, std::int64_t group);

  /// Rows [begin, end) of x, float32 [M, K], split at multiples of kTogether; threads may call for different rows at
  /// once. False if a value is NaN or infinite: then there is no product.
  bool quantize(const float* x, std::int64_t begin, std::int64_t end);

  std::int64_t rows() const { return M_; }
  std::int64_t columns() const { return K_; }
  std::int64_t group() const { return group_; }
  /// Of kTogether rows; see matmul_bytes.cpp.
  const QuantizedRow::Line* lines(std::int64_t tile) const { return lines_.get() + tile * (K_ / 2); }
  const Scales* scales(std::int64_t tile) const { return scales_.get() + tile * (K_ / group_); }

 private:
  std::int64_t M_, K_, group_;
  std::unique_ptr<QuantizedRow::Line[]> lines_;
  std::unique_ptr<Scales[]> scales_;
};

/// `matmul` of rows in integers, all of which were given, with the weights of `linear_int8` and of `linear_int4`.
void matmul_int8(const QuantizedRows& x, const std::int8_t* q, const std::uint16_t* scales, float* y,
                 std::int64_t y_stride, std::int64_t begin, std::int64_t end);
void matmul_int4(const QuantizedRows& x, const std::uint8_t* q, const std::uint16_t* scales, const std::uint8_t* zeros,
                 float* y, std::int64_t y_stride, std::int64_t begin, std::int64_t end);

/// Whether this processor multiplies bfloat16 (AVX-512 BF16), and `linear_bfloat16` may be called.
bool multiplies_bfloat16();

/// Whether it does so at a higher rate than float32. Intel's do not: on an Emerald Rapids the instruction, of 32
/// products, takes four times as long as the multiply-add of 16 in float32.
bool multiplies_bfloat16_faster();

/// `linear` with x, and w, in bfloat16: x [M, K] by its bits. Products are exact and sums float32; subnormal numbers
/// count as zero.
void linear_bfloat16(const std::uint16_t* x, std::int64_t M, std::int64_t K, const std::uint16_t* w, float* y,
                     std::int64_t y_stride, std::int64_t begin, std::int64_t end);

/// Rows [begin, end) of a quantised matrix as float32: out[(n - begin) * K + k] = w[n, k], exactly. For products with
/// more than kMostRows rows of x, where a BLAS is called on blocks of the matrix. Parameters as above.
void widen_int8(std::int64_t K, const std::int8_t* q, const std::uint16_t* scales, std::int64_t group, float* out,
                std::int64_t begin, std::int64_t end);
void widen_int4(std::int64_t K, const std::uint8_t* q, const std::uint16_t* scales, const std::uint8_t* zeros,
                std::int64_t group, float* out, std::int64_t begin, std::int64_t end);

/// The same as bits of bfloat16, rounded to nearest, ties to even.
void widen_int8(std::int64_t K, const std::int8_t* q, const std::uint16_t* scales, std::int64_t group,
                std::uint16_t* out, std::int64_t begin, std::int64_t end);
void widen_int4(std::int64_t K, const std::uint8_t* q, const std::uint16_t* scales, const std::uint8_t* zeros,
                std::int64_t group, std::uint16_t* out, std::int64_t begin, std::int64_t end);

/// `count` keys and their values, each [count, width] and contiguous, as parts of a KV cache. Of none, k and v may be
/// null.
struct Run {
  const void* k;
  const void* v;
  std::int64_t count;
};

/// Attention of one token, for `heads` query heads that share one KV head:
/// out[h * out_stride + d] = sum over all keys of all runs of softmax(scale * q[h * q_stride ...] . k) v[d].
/// q, out: float32, rows of `width`. Keys and values: `type`. Softmax and sums are float32; the softmax is computed on
/// the way, with the largest score so far, so that no score overflows. There must be one key at least.
void attend(const float* q, std::int64_t q_stride, std::int64_t heads, std::int64_t width, float scale,
            std::span<const Run> runs, Type type, float* out, std::int64_t out_stride);

/// The instructions that were chosen, in Highway's words, as "AVX3" for AVX-512.
std::string instruction_set();

}  // namespace nanochat_x::kernels
