#pragma once

// How the rows of a matrix lie in the ring's entries: what the writer, the readers and who packs weights agree on.

#include "decode_params.h"

namespace nanochat_x::cuda {

inline constexpr int kEntryAlignment = 1024;  // the period of the copy engine's swizzle
inline constexpr int kNarrowRows = 32;        // in an entry of less than n_embd columns
inline constexpr int kPassRows = 64;          // rows of n_embd columns whose sums are kept at a time

__host__ __device__ inline int whole_entry(int bytes) {
  return (bytes + kEntryAlignment - 1) / kEntryAlignment * kEntryAlignment;
}

/// Rows of n_embd columns as they lie in memory, with a gap behind each: neighbouring rows then lie in different banks.
/// Of fewer columns, boxes of 32 rows and 64 columns, swizzled.
template <WeightFormat FORMAT>
struct Entries {
  static constexpr int kWideRows = 8;
  static constexpr int kBoxColumns = 64;
  static constexpr int kBoxBytes = kNarrowRows * kBoxColumns * 2;

  static __host__ __device__ int pitch(int columns) { return 2 * columns + 64; }
  static __host__ __device__ int wide_bytes(int n_embd) { return whole_entry(kWideRows * pitch(n_embd)); }
  static __host__ __device__ int narrow_bytes(int columns) { return columns / kBoxColumns * kBoxBytes; }
};

/// Tiles of 16 rows and 32 columns, each as the lanes of a warp take it; then the scales of all tiles, then the zeros.
template <int BITS>
struct PackedEntries {
  static constexpr int kTileRows = 16;
  static constexpr int kWideRows = kTileRows;
  static constexpr int kLaneBytes = 2 * BITS;         // of a tile
  static constexpr int kTileBytes = 32 * kLaneBytes;  // 512 values
  static constexpr int kScaleBytes = 2 * kTileRows;   // bfloat16: those of rows 2 g and 2 g + 1 side by side
  static constexpr int kZeroBytes = BITS == 4 ? kTileRows : 0;

  static __host__ __device__ int tiles(int rows, int columns) { return rows / kTileRows * (columns / kGroup); }
  static __host__ __device__ int bytes(int rows, int columns) {
    return tiles(rows, columns) * (kTileBytes + kScaleBytes + kZeroBytes);
  }
  static __host__ __device__ int wide_bytes(int n_embd) { return whole_entry(bytes(kWideRows, n_embd)); }
  static __host__ __device__ int narrow_bytes(int columns) { return whole_entry(bytes(kNarrowRows, columns)); }
};

template <>
struct Entries<WeightFormat::kInt8> : PackedEntries<8> {};
template <>
struct Entries<WeightFormat::kInt4> : PackedEntries<4> {};

inline constexpr int kGroupBytes = 64;  // of a vector that is multiplied (vector.cuh)

inline constexpr int kProductWarps = 10;  // that multiply rows of n_embd columns
inline constexpr int kSumSlots = (kProductWarps + 3) / 4 * 4;

/// What warps add to a row. Padded: neighbouring rows lie in different banks.
using RowSums = float[kSumSlots + (kSumSlots % 8 == 0 ? 4 : 8)];

/// Of two passes and so many vectors (sums.cuh).
__host__ __device__ inline int sums_bytes(int vectors) {
  return 2 * vectors * kPassRows * static_cast<int>(sizeof(RowSums));
}

inline constexpr int kRotaryBytes = 32 * 16;  // of one position: a lane's angles

/// What products must know of a group of a vector.
struct GroupInfo {
  float step;
  int sum;  // of the integers
  float squares, unused;
};

__host__ __device__ inline int vector_bytes(int columns) {
  return columns / kGroup * (kGroupBytes + static_cast<int>(sizeof(GroupInfo)));
}

}  // namespace nanochat_x::cuda
