// Convolutions by products of vectors (gemm.h) of transformed tiles.
//
// A task is a block of tiles of output pixels. By chunks of kConvChannels, its input and a pixel
// around it are normalized and activated into the first cache, in the accumulator's type, and from
// there transformed to the rows of the products, rounded once. The rows of all channels and
// positions stay in the second cache while the weights stream past, panel by panel; the products
// of a panel are transformed back and leave as pixels.
#pragma once

#include "convolve.h"

namespace snoopi {
namespace {

template <typename F>
struct ConvScratch {
  typename F::Acc* patch;  // [rows, columns, kConvChannels]: activated input
  typename F::Unit* a;     // [positions, tiles, stride]: rows of the products
  typename F::Acc* c;      // [tiles, c_stride]: products of a panel, all positions
  int64_t tiles, stride, c_stride;
};

template <typename F>
int64_t lay_out(const Conv& call, int64_t tiles, int64_t patch, char* memory,
                ConvScratch<F>* scratch) {
  int64_t used = 0;
  const auto take = [&]<typename Part>(Part** part, int64_t count) {
    *part = memory == nullptr ? nullptr : reinterpret_cast<Part*>(memory + used);
    used += round_up(count * static_cast<int64_t>(sizeof(Part)), 64);
  };
  const int64_t positions = positions_of(call.kind);
  scratch->tiles = round_up(tiles, kBlockRows);
  // Strides of a power of two would crowd few sets of the caches.
  scratch->stride = depth_units<F>(depth_of(call.kind, call.c_in)) + 16;
  scratch->c_stride = positions * kPanelColumns<F> + 16;
  take(&scratch->patch, patch * kConvChannels);
  take(&scratch->a, positions * scratch->tiles * scratch->stride);
  take(&scratch->c, scratch->tiles * scratch->c_stride);
  return used;
}

// B^T d of Winograd's transformation for four vectors; kDoubled: of d0 d1 d1 d2, whose third is 0.
template <ConvKind kKind, typename Vector>
inline void transform_in(const Vector* d, Vector* to, int stride) {
  if constexpr (kKind == ConvKind::kDoubled) {
    to[0] = d[0] - d[1];
    to[stride] = d[1] + d[1];
    to[2 * stride] = d[1] - d[2];
  } else {
    to[0] = d[0] - d[2];
    to[stride] = d[1] + d[2];
    to[2 * stride] = d[2] - d[1];
    to[3 * stride] = d[1] - d[3];
  }
}

// A^T m: two outputs of four products; kDoubled: of three.
template <ConvKind kKind, typename Vector>
inline void transform_out(const Vector* m, int stride, Vector* to, int to_stride) {
  if constexpr (kKind == ConvKind::kDoubled) {
    to[0] = m[0] + m[stride];
    to[to_stride] = m[stride] - m[2 * stride];
  } else {
    to[0] = m[0] + m[stride] + m[2 * stride];
    to[to_stride] = m[stride] - m[2 * stride] - m[3 * stride];
  }
}

// Rows of the products from the patch of a chunk: B^T d B of every tile.
template <typename F, ConvKind kKind>
void fill_rows(const ConvTask& task, int64_t channel, const ConvScratch<F>& scratch) {
  typedef typename F::Acc Acc;
  typedef typename F::Element Element;
  constexpr int kW = W<F>;
  constexpr int kSide = kKind == ConvKind::kWinograd ? 4 : 3;
  constexpr int64_t kStep = kKind == ConvKind::kWinograd ? 2 : 1;  // of tiles in the patch
  const int64_t columns = patch_side(kKind, task.x_end - task.x_begin);
  const int64_t stride = scratch.stride * F::kPerUnit;
  Element* row = reinterpret_cast<Element*>(scratch.a) + channel;
  for (int64_t ty = 0; ty < task.y_end - task.y_begin; ++ty) {
    for (int64_t tx = 0; tx < task.x_end - task.x_begin; ++tx, row += stride) {
      const Acc* from = scratch.patch + (kStep * ty * columns + kStep * tx) * kConvChannels;
      for (int64_t v = 0; v < kConvChannels; v += kW) {
        Vec<Acc> d[kSide * kSide];
#pragma GCC unroll 4
        for (int i = 0; i < kSide; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < kSide; ++j) {
            d[i * kSide + j] = load(from + (i * columns + j) * kConvChannels + v);
          }
        }
        Vec<Acc> t[kSide * kSide], u[kSide * kSide];
#pragma GCC unroll 4  // t[j][x] of d[x][j]: down the columns
        for (int j = 0; j < kSide; ++j) {
          Vec<Acc> column[kSide];
#pragma GCC unroll 4
          for (int i = 0; i < kSide; ++i) column[i] = d[i * kSide + j];
          transform_in<kKind>(column, t + j, kSide);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kSide; ++i) transform_in<kKind>(t + i * kSide, u + i * kSide, 1);
#pragma GCC unroll 16
        for (int p = 0; p < kSide * kSide; ++p) {
          narrow_store(u[p], row + p * scratch.tiles * stride + v);
        }
      }
    }
  }
}

// Columns [j, j + columns) of the output pixels of all tiles from their products.
template <typename F, ConvKind kKind>
void leave(const Conv& call, const ConvTask& task, int64_t j, int64_t columns,
           const ConvScratch<F>& scratch) {
  typedef typename F::T T;
  typedef typename F::Acc Acc;
  constexpr int kW = W<F>;
  constexpr int kIn = kKind == ConvKind::kWinograd ? 4 : 3;
  constexpr int kOut = 2;
  constexpr int64_t kDouble = kKind == ConvKind::kDoubled ? 2 : 1;
  const int64_t h = call.h * kDouble, w = call.w * kDouble;
  const int64_t batch = task.b * h * w * call.c_out + j;
  T* out = static_cast<T*>(call.out) + batch;
  const T* residual = static_cast<const T*>(call.residual);
  if (residual != nullptr) residual += batch;
  Vec<Acc> sums[kPanelVectors] = {};
  if (call.added != nullptr) {
    const Acc* added = static_cast<const Acc*>(call.added) + task.b * call.added_stride + j;
    for (int64_t v = 0; v < columns; v += kW) {
      sums[v / kW] = widen_load<Acc>(added + v, columns - v);
    }
  }
  const Acc* c = scratch.c;
  for (int64_t y = task.y_begin * kOut; y < task.y_end * kOut; y += kOut) {
    for (int64_t x = task.x_begin * kOut; x < task.x_end * kOut; x += kOut) {
      for (int64_t v = 0; v < columns; v += kW) {
        Vec<Acc> m[kIn * kIn], t[kOut * kIn], z[kOut * kOut];
#pragma GCC unroll 16
        for (int p = 0; p < kIn * kIn; ++p) m[p] = load(c + p * kPanelColumns<F> + v);
#pragma GCC unroll 4
        for (int i = 0; i < kIn; ++i) transform_out<kKind>(m + i, kIn, t + i, kIn);
#pragma GCC unroll 2
        for (int i = 0; i < kOut; ++i) transform_out<kKind>(t + i * kIn, 1, z + i * kOut, 1);
#pragma GCC unroll 2
        for (int i = 0; i < kOut; ++i) {
#pragma GCC unroll 2
          for (int k = 0; k < kOut; ++k) {
            if (y + i >= h || x + k >= w) continue;
            const int64_t at = ((y + i) * w + x + k) * call.c_out + v;
            Vec<Acc> sum = z[i * kOut + k] + sums[v / kW];
            if (residual != nullptr) sum += widen_load<Acc>(residual + at, columns - v);
            narrow_store<Acc>(sum, out + at, columns - v);
          }
        }
      }
      c += scratch.c_stride;
    }
  }
}

template <typename F, ConvKind kKind>
void convolve(const Conv& call, const ConvTask& task, const ConvScratch<F>& scratch) {
  constexpr int64_t kColumns = kPanelColumns<F>;
  const int64_t depth = depth_of(kKind, call.c_in), units = depth_units<F>(depth);
  const int64_t tiles = (task.y_end - task.y_begin) * (task.x_end - task.x_begin);
  const int64_t matrix = packed_units<F>(call.c_out, depth);  // of one position
  for (int64_t channel = 0; channel < call.c_in; channel += kConvChannels) {
    fill_patch<F>(call, task, channel, channel + kConvChannels, scratch.patch, kConvChannels, 0);
    fill_rows<F, kKind>(task, channel, scratch);
  }
  const typename F::Unit* weight = static_cast<const typename F::Unit*>(call.weight);
  for (int64_t j = task.j_begin; j < task.j_end; j += kColumns) {
    const int64_t columns = task.j_end - j < kColumns ? task.j_end - j : kColumns;
    for (int p = 0; p < positions_of(kKind); ++p) {
      const typename F::Unit* panel = weight + p * matrix + j * units;
      for (int64_t t = 0; t < tiles; t += kBlockRows) {
        const int64_t rows = tiles - t < kBlockRows ? tiles - t : kBlockRows;
        multiply_in_runs<F>(scratch.a + (p * scratch.tiles + t) * scratch.stride, scratch.stride,
                            rows, {panel, units, 0, units, vectors_of<F>(columns)},
                            scratch.c + t * scratch.c_stride + p * kColumns, scratch.c_stride);
      }
    }
    leave<F, kKind>(call, task, j, columns, scratch);
  }
}

template <typename F>
void run_conv(const Conv& call, const ConvTask& task, void* memory) {
  const int64_t height = task.y_end - task.y_begin, width = task.x_end - task.x_begin;
  ConvScratch<F> scratch = {};
  const int64_t patch = patch_side(call.kind, height) * patch_side(call.kind, width);
  lay_out(call, height * width, patch, static_cast<char*>(memory), &scratch);
  const auto run = call.kind == ConvKind::kWinograd ? convolve<F, ConvKind::kWinograd>
                                                    : convolve<F, ConvKind::kDoubled>;
  run(call, task, scratch);
}

template <typename F>
int64_t conv_bytes(const Conv& call, int64_t height, int64_t width) {
  ConvScratch<F> scratch = {};
  const int64_t patch = patch_side(call.kind, height) * patch_side(call.kind, width);
  return lay_out(call, height * width, patch, nullptr, &scratch);
}

template <typename F>
int64_t conv_columns() {
  return kPanelColumns<F>;
}

// Most tiles of a task: their rows are to stay in the second cache beside a panel of weights.
template <typename F>
int64_t conv_tiles(const Conv& call) {
  constexpr int64_t kRoom = 3 << 18, kMost = 48;
  ConvScratch<F> scratch = {};
  lay_out(call, 1, 0, nullptr, &scratch);
  const int64_t row =
      positions_of(call.kind) * scratch.stride * static_cast<int64_t>(sizeof(typename F::Unit));
  const int64_t tiles = kRoom / row / kBlockRows * kBlockRows;
  return tiles < kBlockRows ? kBlockRows : tiles < kMost ? tiles : kMost;
}

template <typename F>
bool convolves(ConvKind kind) {
  return kind == ConvKind::kWinograd || kind == ConvKind::kDoubled;
}

// Winograd's weights are 16/9 the size. Where many channels meet few pixels weights are the cost,
// and PyTorch's products are as fast.
template <typename F>
ConvKind conv_kind(bool doubled, int64_t c_out, int64_t c_in) {
  if (doubled) return ConvKind::kDoubled;
  return (c_out < c_in ? c_out : c_in) <= 640 ? ConvKind::kWinograd : ConvKind::kDirect;
}

}  // namespace
}  // namespace snoopi
