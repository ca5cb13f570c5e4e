// The layout of keys, values and weights that gemm.h multiplies, and how they get there.
#pragma once

#include "attention.h"
#include "gemm.h"

namespace snoopi {
namespace {

template <typename F>
constexpr int W = kWidth<typename F::Acc>;

template <typename F>
inline int64_t vectors_of(int64_t columns) {
  return (columns + W<F> - 1) / W<F>;
}

// Units of a packed matrix: `columns` columns, each `depth` elements deep.
template <typename F>
inline int64_t packed_units(int64_t columns, int64_t depth) {
  return vectors_of<F>(columns) * W<F> * depth_units<F>(depth);
}

// Where vector `v` of a packed matrix begins, and the stride of its steps.
template <typename Unit>
struct Place {
  Unit* at;
  int64_t step;
};

template <typename F>
inline Place<typename F::Unit> place(typename F::Unit* packed, int64_t v, int64_t vectors,
                                     int64_t units) {
  const int64_t panel = v / kPanelVectors * kPanelVectors;
  const int64_t width = vectors - panel < kPanelVectors ? vectors - panel : kPanelVectors;
  return {packed + panel * W<F> * units + (v - panel) * W<F>, width * W<F>};
}

// Row i of a matrix: row live[i], or i itself without `live`, of the tensor.
template <typename T>
inline const T* row_at(const T* rows, int64_t stride, const int32_t* live, int64_t i) {
  return rows + (live == nullptr ? i : live[i]) * stride;
}

// Vectors [v_begin, v_end) of the packed transposed matrix: its rows become columns. For keys and
// weights, whose rows lie along the depth.
template <typename F>
void pack_rows(const typename F::T* rows, int64_t stride, const int32_t* live, int64_t num_rows,
               int64_t depth, int64_t v_begin, int64_t v_end, typename F::Unit* packed) {
  typedef typename F::Unit Unit;
  typedef typename F::Acc Acc;  // of a unit's size: a transposition only moves bits
  static_assert(sizeof(Unit) == sizeof(Acc));
  constexpr int kW = W<F>;
  const int64_t units = depth_units<F>(depth), vectors = vectors_of<F>(num_rows);
  alignas(64) Unit square[kW * kW], turned[kW * kW];
  for (int64_t v = v_begin; v < v_end; ++v) {
    const Place<Unit> to = place<F>(packed, v, vectors, units);
    for (int64_t k = 0; k < units; k += kW) {
      const int64_t first = k * F::kPerUnit;
      for (int64_t r = 0; r < kW; ++r) {
        const int64_t i = v * kW + r;
        const int64_t left = i < num_rows && first < depth ? depth - first : 0;
        const typename F::T* row = row_at(rows, stride, live, i < num_rows ? i : 0);
        fill_units<F>(row + (left > 0 ? first : 0), left, square + r * kW, kW);
      }
      transpose_square(reinterpret_cast<const Acc*>(square), kW, reinterpret_cast<Acc*>(turned),
                       kW);
      const int64_t steps = units - k < kW ? units - k : kW;
      for (int64_t i = 0; i < steps; ++i) {
        __builtin_memcpy(to.at + (k + i) * to.step, turned + i * kW, kW * sizeof(Unit));
      }
    }
  }
}

// The packed matrix of values: its rows are the steps of depth.
template <typename F>
void pack_values(const typename F::T* rows, int64_t stride, const int32_t* live, int64_t num_rows,
                 int64_t columns, typename F::Unit* packed) {
  typedef typename F::Unit Unit;
  constexpr int kW = W<F>;
  const int64_t units = depth_units<F>(num_rows), vectors = vectors_of<F>(columns);
  for (int64_t v = 0; v < vectors; ++v) {
    const Place<Unit> to = place<F>(packed, v, vectors, units);
    const int64_t filled = columns - v * kW < kW ? columns - v * kW : kW;
    for (int64_t k = 0; k < units; ++k) {
      Unit* step = to.at + k * to.step;
      const int64_t i = k * F::kPerUnit;
      const int64_t count = i < num_rows ? filled : 0;
      const typename F::T* row = row_at(rows, stride, live, i < num_rows ? i : 0) + v * kW;
      if constexpr (F::kPerUnit == 1) {
        fill_units<F>(row, count, step, kW);
      } else {
        const bool pair = i + 1 < num_rows;
        const typename F::T* next = pair ? row_at(rows, stride, live, i + 1) + v * kW : row;
        for (int64_t j = 0; j < kW; ++j) {
          const uint32_t low = j < count ? row[j].bits : 0;
          const uint32_t high = pair && j < count ? next[j].bits : 0;
          step[j] = low | high << 16;
        }
      }
    }
  }
}

template <typename F>
int64_t key_bytes(int64_t n, int64_t d) {
  return round_up(packed_units<F>(n, d) * static_cast<int64_t>(sizeof(typename F::Unit)), 64);
}

template <typename F>
int64_t text_bytes(int64_t n, int64_t d) {
  const int64_t values = packed_units<F>(d, n) * static_cast<int64_t>(sizeof(typename F::Unit));
  return key_bytes<F>(n, d) + round_up(values, 64);
}

template <typename F>
void pack_text(const Text& text, int64_t b, int64_t h, const int32_t* live, int64_t num_live,
               void* to) {
  typedef typename F::T T;
  typedef typename F::Unit Unit;
  const T* k = static_cast<const T*>(text.k) + b * text.k_stride[0] + h * text.k_stride[2];
  const T* v = static_cast<const T*>(text.v) + b * text.v_stride[0] + h * text.v_stride[2];
  char* values = static_cast<char*>(to) + key_bytes<F>(text.n, text.d);
  pack_rows<F>(k, text.k_stride[1], live, num_live, text.d, 0, vectors_of<F>(num_live),
               static_cast<Unit*>(to));
  pack_values<F>(v, text.v_stride[1], live, num_live, text.d, reinterpret_cast<Unit*>(values));
}

// Without wide vectors here, the BLAS behind torch, which picks its own, multiplies faster.
#if defined(__AVX2__)
constexpr bool kProjects = true;
#else
constexpr bool kProjects = false;
#endif

template <typename F>
int64_t linear_bytes(int64_t c_out, int64_t c_in) {
  const int64_t units = packed_units<F>(c_out, c_in);
  return kProjects ? units * static_cast<int64_t>(sizeof(typename F::Unit)) : 0;
}

template <typename F>
void pack_linear(const void* w, int64_t stride, int64_t c_out, int64_t c_in, int64_t begin,
                 int64_t end, void* to) {
  pack_rows<F>(static_cast<const typename F::T*>(w), stride, nullptr, c_out, c_in, begin / W<F>,
               vectors_of<F>(end), static_cast<typename F::Unit*>(to));
}

}  // namespace
}  // namespace snoopi
