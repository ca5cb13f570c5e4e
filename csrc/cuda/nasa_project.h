// The output projection inside the kernel: out = z w_out^T + b_out of a block's rows, all heads.
#pragma once

#include "nasa_attend.h"

namespace snoopi {
inline namespace SIMT_BACKEND {

// Bytes between rows of z in shared memory. Products are 16 deep, so z has whole sixteens.
SIMT_DEVICE int projected_row(int depth) { return row_bytes(round_up(depth, 16)); }

// Behind an odd number of eights z needs zeros: what lies there by chance may be NaN, and NaN times
// the zeros of w_out is not zero.
template <typename S>
SIMT_DEVICE void clear_padding(int depth, const Place& at) {
  if (depth % 16 == 0 || fault(7)) return;
  for (int row = at.thread; row < S::kRows; row += S::kThreads) {
    store_shared(S::kProjectedAt + row * projected_row(depth) + 2 * depth, Bytes16{});
  }
}

// Starts the copy of a tile of w_out: kColumns output channels from `column`, kRun inputs from
// `run`.
template <typename S>
SIMT_DEVICE void copy_weights(const NasaParams& p, int depth, int column, int run, int stage,
                              const Place& where) {
  typedef typename S::T T;
  const Place at = where.again();
  constexpr int kChunks = S::kRun / 8;
  const int to = S::kQueryBytes + stage * S::kWeightBytes;
  const T* from = static_cast<const T*>(p.w_out) + static_cast<int64_t>(column) * depth + run;
  SIMT_UNROLL
  for (int i = 0; i < S::kColumns * kChunks / S::kThreads; ++i) {
    const int chunk = at.thread + i * S::kThreads;
    const int row = chunk / kChunks, k = chunk % kChunks * 8;
    const bool live = column + row < p.c_out && run + k < depth;
    if (fault(13) && column + row >= p.c_out) continue;  // their columns are dropped anyway
    copy_async16(to + row * S::kWeightRow + 2 * k, from + row * depth + k, live);
  }
}

// sum [16 kColumns] += z w^T of one tile, of a warp's rows.
template <typename S>
SIMT_DEVICE void multiply_weights(float (&sum)[S::kColumns / 8][4], int depth, int run, int stage,
                                  const Place& at) {
  const int rows = S::kProjectedAt + (kWarpRows * at.warp + at.lane % 16) * projected_row(depth);
  const int weights = S::kQueryBytes + stage * S::kWeightBytes +
                      (at.lane % 8 + at.lane / 16 * 8) * S::kWeightRow + at.lane / 8 % 2 * 16;
  SIMT_UNROLL
  for (int k = 0; k < S::kRun; k += 16) {
    if (run + k >= depth) break;
    uint32_t left[4];
    load_matrices4(left, rows + (run + k + at.lane / 16 * 8) * 2);
    SIMT_UNROLL
    for (int j = 0; j < S::kColumns / 8; j += 2) {
      uint32_t w[4];
      load_matrices4(w, weights + 8 * j * S::kWeightRow + 2 * k);
      multiply_16816<typename S::T>(sum[j], left, w[0], w[1]);
      multiply_16816<typename S::T>(sum[j + 1], left, w[2], w[3]);
    }
  }
}

template <typename S>
SIMT_DEVICE void store_columns(const NasaParams& p, const Tile& tile, int column,
                               const float (&sum)[S::kColumns / 8][4], const Place& where) {
  typedef typename S::T T;
  const Place at = where.again();
  const int c_out = static_cast<int>(p.c_out);
  T* out = static_cast<T*>(p.out[0]) + tile.row_of_all(p, 0) * p.c_out;
  SIMT_UNROLL
  for (int j = 0; j < S::kColumns / 8; ++j) {
    const int c = column + 8 * j + 2 * at.pair;
    if (c >= c_out) continue;
    const bool both = c + 1 < c_out;
    const T* bias = static_cast<const T*>(p.b_out);
    const float first = bias == nullptr ? 0.0f : widen(load_global(bias + c));
    const float second = bias == nullptr || !both ? 0.0f : widen(load_global(bias + c + 1));
    SIMT_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = kWarpRows * at.warp + at.group + 8 * r;
      if (row >= tile.count) continue;
      const uint32_t x = pack2<T>(sum[j][2 * r] + first, sum[j][2 * r + 1] + second);
      T* to = out + static_cast<int64_t>(row) * c_out + c;
      if (c_out % 2 == 0) {
        store_global(reinterpret_cast<uint32_t*>(to), x);
      } else {  // then every second row begins between two words
        store_global(to, T{static_cast<uint16_t>(x)});
        if (both) store_global(to + 1, T{static_cast<uint16_t>(x >> 16)});
      }
    }
  }
}

// Tiles of w_out stream past z, run by run of each set of columns, in two stages.
template <typename S>
SIMT_DEVICE void project(const NasaParams& p, const Tile& tile, const Place& at) {
  const int depth = static_cast<int>(p.h) * S::D;
  const int runs = (depth + S::kRun - 1) / S::kRun;
  const int total = (static_cast<int>(p.c_out) + S::kColumns - 1) / S::kColumns * runs;
  const auto copy = [&](int i) {
    if (i < total) {
      const int column = i / runs * S::kColumns, run = i % runs * S::kRun;
      copy_weights<S>(p, depth, column, run, i % S::kWeightStages, at);
    }
    copy_commit();
  };
  for (int i = 0; i < S::kWeightStages; ++i) copy(i);
  float sum[S::kColumns / 8][4];
  for (int i = 0; i < total; ++i) {
    copy_wait<S::kWeightStages - 1>();
    block_sync();
    if (i % runs == 0) {
      SIMT_UNROLL
      for (int j = 0; j < S::kColumns / 8; ++j)
        sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0.0f;
    }
    multiply_weights<S>(sum, depth, i % runs * S::kRun, i % S::kWeightStages, at);
    if (i % runs == runs - 1) store_columns<S>(p, tile, i / runs * S::kColumns, sum, at);
    if (!fault(4)) block_sync();  // nobody reads this stage any more
    copy(i + S::kWeightStages);
  }
}

}  // namespace SIMT_BACKEND
}  // namespace snoopi
