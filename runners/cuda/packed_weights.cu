#include <cuda_bf16.h>

#include <algorithm>

#include "entries.h"
#include "launch.h"
#include "packed.cuh"
#include "packed_weights.h"
#include "producer.cuh"

namespace nanochat_x::cuda {
namespace {

constexpr int kPackThreads = 256;

// A matrix of the bundle, on the card.
template <int BITS>
struct Source {
  const unsigned char* values;
  const __nv_bfloat16* scales;
  const unsigned char* zeros;
  int rows, columns, group;

  Source(const QuantizedMatrix& matrix, std::int64_t matrix_rows, std::int64_t matrix_columns, std::int64_t group_size)
      : values(static_cast<const unsigned char*>(matrix.values)),
        scales(static_cast<const __nv_bfloat16*>(matrix.scales)),
        zeros(static_cast<const unsigned char*>(matrix.zeros)),
        rows(static_cast<int>(matrix_rows)),
        columns(static_cast<int>(matrix_columns)),
        group(static_cast<int>(group_size)) {}

  __device__ long long group_of(int row, int column) const {
    return static_cast<long long>(row) * (columns / group) + column / group;
  }
  // 0 behind the last row, as are scale and zero.
  __device__ unsigned value(int row, int column) const {
    if (row >= rows) return 0;
    if constexpr (BITS == 8) return values[static_cast<long long>(row) * columns + column];
    const int inside = column % group, half = group / 2;
    const unsigned two = values[group_of(row, column) * half + inside % half];
    return inside < half ? two & 15U : two >> 4U;
  }
  __device__ unsigned scale(int row, int column) const {
    return row < rows ? __bfloat16_as_ushort(scales[group_of(row, column)]) : 0;
  }
  __device__ unsigned zero(int row, int column) const { return row < rows ? zeros[group_of(row, column)] : 0; }
};

// An entry: tiles as the lanes of a warp take them. All threads of the block; returns where the next entry begins.
template <int BITS>
__device__ unsigned char* pack_entry(unsigned char* to, const Source<BITS>& from, int first_row, int first_column,
                                     int rows, int columns) {
  using E = PackedEntries<BITS>;
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, j = lane % 4;
  const int across = columns / kGroup, tiles = E::tiles(rows, columns);
  for (int tile = static_cast<int>(threadIdx.x) / 32; tile < tiles; tile += kPackThreads / 32) {
    const int row = first_row + tile / across * E::kTileRows + 2 * g;
    const int column = first_column + tile % across * kGroup;
    // The left operand's registers: its rows g and g + 8, of columns 4 j to 4 j + 3, then of those 16 behind.
    std::uint32_t registers[4] = {};
    for (int i = 0; i < 4; ++i) {
      for (int byte = 0; byte < 4; ++byte) {
        registers[i] |= from.value(row + i % 2, column + i / 2 * 16 + 4 * j + byte) << (8 * byte);
      }
    }
    unsigned char* own = to + tile * E::kTileBytes + lane * E::kLaneBytes;
    if constexpr (BITS == 8) {
      *reinterpret_cast<uint4*>(own) = make_uint4(registers[0], registers[1], registers[2], registers[3]);
    } else {
      *reinterpret_cast<uint2*>(own) = make_uint2(registers[0] | registers[1] << 4U, registers[2] | registers[3] << 4U);
    }
    if (j != 0) continue;
    unsigned char* scales = to + tiles * E::kTileBytes;
    *reinterpret_cast<std::uint32_t*>(scales + tile * E::kScaleBytes + 4 * g) =
        from.scale(row, column) | from.scale(row + 1, column) << 16U;
    if constexpr (BITS == 4) {
      *reinterpret_cast<unsigned short*>(scales + tiles * E::kScaleBytes + tile * E::kZeroBytes + 2 * g) =
          static_cast<unsigned short>(from.zero(row, column) | from.zero(row + 1, column) << 8U);
    }
  }
  return to + E::bytes(rows, columns);
}

template <int BITS>
struct PackParams {
  using From = Source<BITS>;
  From c_q, c_k, c_v, c_proj, c_fc, mlp_c_proj;
  int n_embd, group, n_layer, layer;
  ClusterShare shares[kMostClusters];
  PackedStream stream;
  unsigned char* layers;
};

// Rows of which a cluster takes some columns.
template <int BITS>
__device__ unsigned char* pack_narrow(unsigned char* to, const Source<BITS>& from, int first_row, int rows, int begin,
                                      int end) {
  using E = PackedEntries<BITS>;
  for (int row = 0; row < rows; row += kNarrowRows) {
    to = pack_entry(to, from, first_row + row, begin, kNarrowRows, end - begin);
  }
  return to;
}

// A block packs what a block of the decode kernel takes of one layer, in the order of `PackedProducer`.
template <int BITS>
__global__ void pack_layer(const __grid_constant__ PackParams<BITS> p) {
  using E = PackedEntries<BITS>;
  const int cluster = static_cast<int>(blockIdx.x) / kRanks, rank = static_cast<int>(blockIdx.x) % kRanks;
  const ClusterShare& share = p.shares[cluster];
  unsigned char* to = p.layers + p.stream.cluster[cluster] +
                      (static_cast<long long>(rank) * p.n_layer + p.layer) * p.stream.layer_bytes[cluster];
  for (int kv_head = share.kv_begin; kv_head < share.kv_end; ++kv_head) {
    for (int i = 0; i < p.group + 2; ++i) {
      const int head = i < p.group ? kv_head * p.group + i : kv_head;
      const auto& from = i < p.group ? p.c_q : i == p.group ? p.c_k : p.c_v;
      to = pack_entry(to, from, head * kHeadDim + rank * kRankRows, 0, kRankRows, p.n_embd);
    }
  }
  const RankRows own(p.n_embd, rank);
  const int head_columns = p.group * kHeadDim;
  if (share.kv_heads() > 0) {
    to = pack_narrow(to, p.c_proj, own.begin, own.count(), share.kv_begin * head_columns, share.kv_end * head_columns);
  }
  const int rows = share.hidden() / kRanks;
  for (int row = 0; row < rows; row += E::kWideRows) {
    to = pack_entry(to, p.c_fc, share.hidden_begin + rank * rows + row, 0, E::kWideRows, p.n_embd);
  }
  pack_narrow(to, p.mlp_c_proj, own.begin, own.count(), share.hidden_begin, share.hidden_end);
}

template <int BITS>
__global__ void pack_head(const __grid_constant__ Source<BITS> from, unsigned char* to) {
  using E = PackedEntries<BITS>;
  const long long tile = blockIdx.x;
  pack_entry(to + tile * E::bytes(E::kWideRows, from.columns), from, static_cast<int>(tile) * E::kWideRows, 0,
             E::kWideRows, from.columns);
}

template <int BITS>
__global__ void round_values(const __grid_constant__ Source<BITS> from, __nv_bfloat16* to) {
  const int row = static_cast<int>(blockIdx.x);
  for (int column = static_cast<int>(threadIdx.x); column < from.columns; column += kPackThreads) {
    const unsigned value = from.value(row, column);
    const int steps = BITS == 8 ? static_cast<int>(static_cast<signed char>(value))
                                : static_cast<int>(value) - static_cast<int>(from.zero(row, column));
    to[static_cast<long long>(row) * from.columns + column] = __float2bfloat16_rn(
        static_cast<float>(steps) * __bfloat162float(__ushort_as_bfloat16(from.scale(row, column))));
  }
}

// Sizes of the stream's parts, but for where it lies; returns the bytes of all layers.
template <int BITS>
std::size_t lay_out(const DecoderModel& model, const std::vector<ClusterShare>& shares, PackedStream& stream) {
  using E = PackedEntries<BITS>;
  const int width = static_cast<int>(model.n_embd), group = static_cast<int>(model.n_head / model.n_kv_head);
  long long all = 0;
  for (std::size_t c = 0; c < shares.size(); ++c) {
    const int heads = shares[c].kv_heads(), hidden = shares[c].hidden();
    stream.cluster[c] = all;
    // Room for the rank with the most rows.
    stream.layer_bytes[c] = E::bytes(heads * (group + 2) * kRankRows + hidden / kRanks, width) +
                            E::bytes(most_rank_rows(width), heads * group * kHeadDim + hidden);
    all += stream.layer_bytes[c] * kRanks * static_cast<long long>(model.layers.size());
  }
  return static_cast<std::size_t>(all);
}

template <int BITS>
void pack(const DecoderModel& m, const std::vector<ClusterShare>& shares, const PackedStream& stream,
          unsigned char* layers, unsigned char* head) {
  const std::int64_t kv = m.n_kv_head * kHeadDim, c = m.n_embd;
  const auto source = [&](const QuantizedMatrix& matrix, std::int64_t rows, std::int64_t columns) {
    return Source<BITS>(matrix, rows, columns, m.quant_group);
  };
  const auto blocks = static_cast<unsigned>(shares.size()) * kRanks;
  for (std::size_t i = 0; i < m.layers.size(); ++i) {
    const DecoderLayer::Quantized& w = m.layers[i].quantized;
    PackParams<BITS> p{source(w.c_q, c, c),
                       source(w.c_k, kv, c),
                       source(w.c_v, kv, c),
                       source(w.c_proj, c, c),
                       source(w.c_fc, m.mlp_width, c),
                       source(w.mlp_c_proj, c, m.mlp_width),
                       static_cast<int>(c),
                       static_cast<int>(m.n_head / m.n_kv_head),
                       static_cast<int>(m.layers.size()),
                       static_cast<int>(i),
                       {},
                       stream,
                       layers};
    std::ranges::copy(shares, p.shares);
    launch({.grid = dim3(blocks), .threads = kPackThreads, .stream = nullptr}, pack_layer<BITS>, p);
  }
  launch({.grid = dim3(static_cast<unsigned>((m.vocab + kHeadTile - 1) / kHeadTile)),
          .threads = kPackThreads,
          .stream = nullptr},
         pack_head<BITS>, source(m.quantized_head, m.vocab, c), head);
}

}  // namespace

PackedWeights::PackedWeights(const DecoderModel& model, const std::vector<ClusterShare>& shares) {
  const std::size_t bytes = model.bits == 8 ? lay_out<8>(model, shares, stream_) : lay_out<4>(model, shares, stream_);
  const int width = static_cast<int>(model.n_embd);
  const int tile =
      model.bits == 8 ? PackedEntries<8>::bytes(kHeadTile, width) : PackedEntries<4>::bytes(kHeadTile, width);
  layers_ = DeviceArray<unsigned char>(bytes);
  head_ = DeviceArray<unsigned char>(static_cast<std::size_t>((model.vocab + kHeadTile - 1) / kHeadTile * tile));
  stream_.layers = layers_.data();
  stream_.head = head_.data();
  if (model.bits == 8) {
    pack<8>(model, shares, stream_, layers_.data(), head_.data());
  } else {
    pack<4>(model, shares, stream_, layers_.data(), head_.data());
  }
  check(cudaDeviceSynchronize(), "packing weights");
}

void round_to_bfloat16(const QuantizedMatrix& from, int bits, std::int64_t group, std::int64_t rows,
                       std::int64_t columns, void* to) {
  const Launch how{.grid = dim3(static_cast<unsigned>(rows)), .threads = kPackThreads, .stream = nullptr};
  if (bits == 8) {
    launch(how, round_values<8>, Source<8>(from, rows, columns, group), static_cast<__nv_bfloat16*>(to));
  } else {
    launch(how, round_values<4>, Source<4>(from, rows, columns, group), static_cast<__nv_bfloat16*>(to));
  }
}

}  // namespace nanochat_x::cuda
