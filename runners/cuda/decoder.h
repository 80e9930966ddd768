#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace nanochat_x::cuda {

/// A matrix in 8 or 4 bits on the card, as docs/quantization.md has it: scales and zeros of groups along a row.
struct QuantizedMatrix {
  const void* values = nullptr;  ///< int8 [N, K], or uint8 [N, K / 2]
  const void* scales = nullptr;  ///< bfloat16 [N, K / group]
  const void* zeros = nullptr;   ///< uint8 [N, K / group], of 4 bits
};

/// One layer of a model on the card: device pointers to row-major bfloat16 matrices [N, K]. c_q, c_k and c_v lie one
/// behind the other, as one matrix.
struct DecoderLayer {
  const void *c_q = nullptr, *c_k = nullptr, *c_v = nullptr, *c_proj = nullptr, *c_fc = nullptr, *mlp_c_proj = nullptr;
  const void* value_embed = nullptr;  ///< bfloat16 [vocab, n_kv_head * 128]; null: none
  const float* ve_gate = nullptr;     ///< [n_kv_head, gate_channels], with a value embedding
  float resid_lambda = 1, x0_lambda = 0;
  std::int64_t window = -1;  ///< keys behind a query that it sees; -1: all
  /// What those matrices stand for, in a model that has them so; the matrices themselves then are its rounded values.
  struct Quantized {
    QuantizedMatrix c_q, c_k, c_v, c_proj, c_fc, mlp_c_proj;
  } quantized;
};

/// A model on the card. The memory that it points to must outlive the Decoder.
struct DecoderModel {
  std::int64_t n_embd = 0, n_head = 0, n_kv_head = 0, mlp_width = 0, vocab = 0;
  float norm_eps = 0, qk_scale = 1;
  float softcap = 0;  ///< 0: none
  float gate_scale = 0;
  std::int64_t gate_channels = 0, smear_channels = 0;  ///< 0: none
  float smear_lambda = 0, backout_lambda = 0;
  std::int64_t backout_layer = -1;                ///< -1: none
  const void *wte = nullptr, *lm_head = nullptr;  ///< bfloat16 [vocab, n_embd]
  const float* smear_gate = nullptr;              ///< [smear_channels]
  const float *cos = nullptr, *sin = nullptr;     ///< [positions, 64]
  int bits = 16;                                  ///< of a weight of a matrix: 16, or 8 and 4 with `quantized`
  std::int64_t quant_group = 0;                   ///< weights that share a scale
  QuantizedMatrix quantized_head;                 ///< of lm_head
  std::vector<DecoderLayer> layers;
};

/// Keys and values of a sequence on the card, bfloat16 [layers, rows, n_kv_head, capacity, 128].
struct DecoderCache {
  void *keys = nullptr, *values = nullptr;  ///< of the row that is to be decoded
  std::int64_t rows = 1, capacity = 0;
  std::int64_t shared = 0;  ///< leading positions that this row and all behind it have alike
};

/// Why a model cannot be decoded by this kernel; empty: it can. Sizes alone count.
const char* why_not(const DecoderModel& model);
/// Throws Error if the model or this card is not one for the kernels.
void check_can_decode(const DecoderModel& model);

/// What a sequence (a row) has reached: `token` at `position` is fed next, behind `previous`.
struct DecodeState {
  int token, previous, position;
};

/// Decodes up to four sequences, a persistent kernel for any number of steps.
class Decoder {
 public:
  /// On the current device. What `quantized` points to is packed anew and need not outlive this. Throws Error for a
  /// model that `why_not` refuses, a card below compute capability 9.0, or without memory.
  explicit Decoder(DecoderModel model);
  ~Decoder();
  Decoder(Decoder&&) noexcept;
  Decoder& operator=(Decoder&&) noexcept;

  /// What is fed next in each row, 1 to `most_rows()` of them. Ordered on `stream` (a cudaStream_t).
  void set_states(std::span<const DecodeState> rows, void* stream);
  /// `steps` steps of the first `rows` rows: keys and values are appended to `cache`, whose first row is theirs. With
  /// `forced` (device memory, ids [steps, rows]) these are fed, else the states' tokens and then the most likely ones.
  /// Does not wait for the card. position + steps <= capacity in every row.
  void run(std::int64_t steps, std::int64_t rows, const int* forced, const DecoderCache& cache, void* stream);

  /// How many rows a run can have: 4, or fewer of a model for which the card's shared memory is too small.
  std::int64_t most_rows() const;
  const float* logits() const;  ///< device memory [rows, vocab], of the last step
  const int* drawn() const;     ///< device memory [steps, rows]: the most likely token after each step of the last run
  static constexpr std::int64_t kMostSteps = 256;  ///< of one run

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace nanochat_x::cuda
