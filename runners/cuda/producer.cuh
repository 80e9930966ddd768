#pragma once

// What the producer's warp puts into the ring: every row that this block multiplies with, in the order in which
// `Consumer` takes them.

#include <cuda_bf16.h>

#include "attend.cuh"
#include "cluster.cuh"
#include "entries.h"
#include "ring.cuh"

namespace nanochat_x::cuda {

inline constexpr int kHeadTile = 16;                 // rows of lm_head
inline constexpr int kRankRows = kHeadDim / kRanks;  // of each head's c_q, c_k and c_v

// This block's part of lm_head, in tiles of rows.
struct Tiles {
  int begin, end;
};

__device__ inline Tiles head_tiles(int vocab) {
  const int tiles = (vocab + kHeadTile - 1) / kHeadTile, blocks = static_cast<int>(gridDim.x);
  return {tiles * static_cast<int>(blockIdx.x) / blocks, tiles * (static_cast<int>(blockIdx.x) + 1) / blocks};
}

// Has the keys and values that this block will attend to brought into the L2 cache.
__device__ inline void prefetch_split(const DecodeParams& p, long long head, const Split& split) {
  if (split.count <= 0 || threadIdx.x % 32 != 0) return;
  const long long at = head + static_cast<long long>(split.first) * kHeadDim;
  for (const __nv_bfloat16* from : {p.cache_k + at, p.cache_v + at}) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(split.count * kHeadDim * 2) : "memory");
  }
}

// Matrices as they lie in memory, by rows.
struct RowProducer {
  using E = Entries<WeightFormat::kBfloat16>;

  const DecodeParams& p;
  const LayerParams* layers;
  RingWriter& ring;
  const ClusterShare& share;
  int rank;

  __device__ void wide(const __nv_bfloat16* rows, int count) {
    const int bytes = 2 * p.n_embd, lane = static_cast<int>(threadIdx.x) % 32;
    for (int row = 0; row < count; row += E::kWideRows) {
      const int here = min(E::kWideRows, count - row);
      ring.put(E::wide_bytes(p.n_embd), here * bytes,
               [&](std::uint32_t to, std::uint64_t* barrier, std::uint64_t policy) {
                 if (lane < here) {
                   copy_bulk(to + static_cast<unsigned>(lane * E::pitch(p.n_embd)),
                             rows + static_cast<long long>(row + lane) * p.n_embd, bytes, barrier, policy);
                 }
               });
    }
  }
  // This rank's rows, of which a cluster takes some columns.
  __device__ void narrow(const CUtensorMap* map, int begin, int end) {
    const RankRows own(p.n_embd, rank);
    const int lane = static_cast<int>(threadIdx.x) % 32, boxes = (end - begin) / E::kBoxColumns;
    for (int row = own.begin; row < own.end; row += kNarrowRows) {
      const int bytes = E::narrow_bytes(end - begin);
      ring.put(bytes, bytes, [&](std::uint32_t to, std::uint64_t* barrier, std::uint64_t policy) {
        for (int box = lane; box < boxes; box += 32) {
          copy_box(to + static_cast<unsigned>(box * E::kBoxBytes), map, begin + box * E::kBoxColumns, row, barrier,
                   policy);
        }
      });
    }
  }
  __device__ void layer(int index) {
    const LayerParams& w = layers[index];
    const long long c = p.n_embd;
    const int group = p.n_head / p.n_kv_head, head_columns = group * kHeadDim;
    for (int kv_head = share.kv_begin; kv_head < share.kv_end; ++kv_head) {
      for (int i = 0; i < group + 2; ++i) {
        const int head = i < group ? kv_head * group + i : kv_head;
        const __nv_bfloat16* matrix = i < group ? w.c_q : i == group ? w.c_k : w.c_v;
        wide(matrix + (head * kHeadDim + rank * kRankRows) * c, kRankRows);
      }
    }
    if (share.kv_heads() > 0) {
      narrow(&p.maps[index].c_proj, share.kv_begin * head_columns, share.kv_end * head_columns);
    }
    const int rows = share.hidden() / kRanks;
    wide(w.c_fc + (share.hidden_begin + rank * rows) * c, rows);
    narrow(&p.maps[index].mlp_c_proj, share.hidden_begin, share.hidden_end);
  }
  __device__ void head() {
    const Tiles tiles = head_tiles(p.vocab);
    const int begin = tiles.begin * kHeadTile;
    wide(p.lm_head + static_cast<long long>(begin) * p.n_embd, min(tiles.end * kHeadTile, p.vocab) - begin);
  }
};

// Entries one behind the other, as `pack_weights` laid them.
template <WeightFormat FORMAT>
struct PackedProducer {
  using E = Entries<FORMAT>;

  const DecodeParams& p;
  RingWriter& ring;
  const ClusterShare& share;
  int rank;

  __device__ void put(const unsigned char*& from, int size, int bytes) {
    ring.put(size, bytes, [&](std::uint32_t to, std::uint64_t* barrier, std::uint64_t policy) {
      if (threadIdx.x % 32 == 0) copy_bulk(to, from, bytes, barrier, policy);
    });
    from += bytes;
  }
  __device__ void wide(const unsigned char*& from) {
    put(from, E::wide_bytes(p.n_embd), E::bytes(E::kWideRows, p.n_embd));
  }
  __device__ void narrow(const unsigned char*& from, int width) {
    for (int row = 0; row < RankRows(p.n_embd, rank).count(); row += kNarrowRows) {
      put(from, E::narrow_bytes(width), E::bytes(kNarrowRows, width));
    }
  }
  __device__ void layer(int index) {
    const int cluster = static_cast<int>(blockIdx.x) / kRanks, group = p.n_head / p.n_kv_head;
    const unsigned char* from = p.packed.layers + p.packed.cluster[cluster] +
                                (static_cast<long long>(rank) * p.n_layer + index) * p.packed.layer_bytes[cluster];
    for (int i = 0; i < share.kv_heads() * (group + 2); ++i) wide(from);
    if (share.kv_heads() > 0) narrow(from, share.kv_heads() * group * kHeadDim);
    for (int row = 0; row < share.hidden() / kRanks; row += E::kWideRows) wide(from);
    narrow(from, share.hidden());
  }
  __device__ void head() {
    const Tiles tiles = head_tiles(p.vocab);
    const long long bytes = E::bytes(kHeadTile, p.n_embd);
    const unsigned char* from = p.packed.head + tiles.begin * bytes;
    for (int tile = tiles.begin; tile < tiles.end; ++tile) wide(from);
  }
};

template <WeightFormat FORMAT, int ROWS>
__device__ void produce(const DecodeParams& p, const LayerParams* layers, RingWriter& ring) {
  const ClusterShare& share = p.shares[blockIdx.x / kRanks];
  const int rank = cluster_rank();
  int positions[ROWS];
#pragma unroll
  for (int row = 0; row < ROWS; ++row) positions[row] = row < p.rows ? p.state[row].position : 0;
  auto matrices = [&] {
    if constexpr (FORMAT == WeightFormat::kBfloat16) {
      return RowProducer{p, layers, ring, share, rank};
    } else {
      return PackedProducer<FORMAT>{p, ring, share, rank};
    }
  }();
  for (int step = 0; step < p.steps; ++step) {
    for (int layer = 0; layer < p.n_layer; ++layer) {
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        if (row >= p.rows) break;
        const Split split(positions[row] + step, layers[layer].window, rank);
        for (int kv_head = share.kv_begin; kv_head < share.kv_end; ++kv_head) {
          prefetch_split(p, layer * p.cache_layer + row * p.cache_row + kv_head * p.cache_head, split);
        }
      }
      matrices.layer(layer);
    }
    matrices.head();
  }
}

}  // namespace nanochat_x::cuda
