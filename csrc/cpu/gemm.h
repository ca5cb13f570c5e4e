// Products of a few rows with packed panels: c[r][j] = sum over k of a[r][k] b[k][j].
//
// `a` is row-major and read by broadcast, so queries are used where they lie. `b` is cut into
// panels of two vectors of columns (the last may be one), each contiguous over the depth, so that a
// step of depth is two loads. With 12 rows 24 accumulators fill AVX-512's registers, and a step's
// 24 multiply-adds hide its 14 loads. Every element is one chain of multiply-adds over the depth in
// ascending order, whatever the blocking.
#pragma once

#include "formats.h"

#if defined(SNOOPI_AMX)
#include "amx.h"
#endif

namespace snoopi {
namespace {

constexpr int kPanelVectors = 2;

#if defined(SNOOPI_AMX)
constexpr int kBlockRows = 32;
#elif defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockRows = 12;  // of 32 registers 2 * 12 accumulate
#else
constexpr int kBlockRows = 6;  // of 16 registers 2 * 6 accumulate
#endif

template <typename F>
constexpr int kPanelColumns = kPanelVectors * kWidth<typename F::Acc>;

template <typename Acc>
inline Vec<Acc> multiply_add(Vec<Acc> sum, Acc a, Vec<Acc> b) {
  return sum + splat(a) * b;
}

// `vectors` vectors of columns of a packed matrix in panels of `depth` units; of these `steps` are
// multiplied from `begin` on.
template <typename F>
struct Panels {
  const typename F::Unit* at;
  int64_t depth, begin, steps, vectors;
};

#if defined(__AVX512BF16__)
inline VecF multiply_add(VecF sum, uint32_t a, VecF b) {
  return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)),
                                (__m512bh)b);
}
#endif

// A block of kRows rows and kVectors vectors of columns.
template <typename F, int kRows, int kVectors>
inline void multiply_block(const typename F::Unit* a, int64_t a_stride, const typename F::Unit* b,
                           int64_t steps, typename F::Acc* c, int64_t c_stride, bool add) {
  typedef typename F::Acc Acc;
  typedef typename F::Unit Unit;
  constexpr int W = kWidth<Acc>;
  Vec<Acc> sum[kRows][kVectors] = {};
  if (add) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] = load(c + r * c_stride + v * W);
    }
  }
  // One pointer for three rows: x86 addresses reach the other two by the stride and its double.
  constexpr int kPointers = (kRows + 2) / 3;
  const Unit* row[kPointers];
  for (int i = 0; i < kPointers; ++i) row[i] = a + 3 * i * a_stride;
  for (int64_t k = 0; k < steps; ++k) {
    Vec<Acc> columns[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      __builtin_memcpy(&columns[v], b + (k * kVectors + v) * W, sizeof(columns[v]));
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Unit unit = row[r / 3][r % 3 * a_stride + k];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(sum[r][v], unit, columns[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * W, sum[r][v]);
  }
}

// `multiply` for a number of rows known only now.
template <typename F, int kRows>
inline void multiply_rows(const typename F::Unit* a, int64_t a_stride, int64_t rows,
                          const Panels<F>& b, typename F::Acc* c, int64_t c_stride, bool add) {
  constexpr int W = kWidth<typename F::Acc>;
  if (rows == kRows) {
    for (int64_t v = 0; v < b.vectors; v += 2) {
      const typename F::Unit* panel = b.at + v * W * b.depth;
      if (v + 1 < b.vectors) {
        multiply_block<F, kRows, 2>(a, a_stride, panel + b.begin * 2 * W, b.steps, c + v * W,
                                    c_stride, add);
      } else {
        multiply_block<F, kRows, 1>(a, a_stride, panel + b.begin * W, b.steps, c + v * W, c_stride,
                                    add);
      }
    }
  } else if constexpr (kRows > 1) {
    multiply_rows<F, kRows - 1>(a, a_stride, rows, b, c, c_stride, add);
  }
}

// Rows [0, rows) of a times all panels of b; c += if `add`, else c =. rows is at most kBlockRows.
// a and the strides are in units. AMX multiplies whole tiles: a and c have room for kBlockRows rows
// there, and a is as deep as whole tiles of steps; behind the last step b has zeros.
template <typename F>
inline void multiply(const typename F::Unit* a, int64_t a_stride, int64_t rows, const Panels<F>& b,
                     typename F::Acc* c, int64_t c_stride, bool add = false) {
#if defined(SNOOPI_AMX)
  multiply_tiles(a, a_stride, rows, b.at, b.depth, b.begin, b.steps, b.vectors, c, c_stride, add);
#else
  multiply_rows<F, kBlockRows>(a, a_stride, rows, b, c, c_stride, add);
#endif
}

// `multiply` by runs of depth that are summed for themselves: one chain of thousands of sums would
// round several times as much as a sum of chains. At most one panel; AMX sums in one chain.
template <typename F>
inline void multiply_in_runs(const typename F::Unit* a, int64_t a_stride, int64_t rows,
                             const Panels<F>& b, typename F::Acc* c, int64_t c_stride) {
#if defined(SNOOPI_AMX)
  multiply<F>(a, a_stride, rows, b, c, c_stride);
#else
  typedef typename F::Acc Acc;
  constexpr int kW = kWidth<Acc>;
  constexpr int64_t kRun = 256;
  alignas(64) Acc part[kBlockRows * kPanelColumns<F>];
  for (int64_t k = 0; k < b.steps; k += kRun) {
    const int64_t steps = b.steps - k < kRun ? b.steps - k : kRun;
    const Panels<F> run = {b.at, b.depth, b.begin + k, steps, b.vectors};
    if (k == 0) {
      multiply<F>(a, a_stride, rows, run, c, c_stride);
      continue;
    }
    multiply<F>(a + k, a_stride, rows, run, part, kPanelColumns<F>);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < b.vectors * kW; v += kW) {
        const Vec<Acc> sum = load(c + r * c_stride + v) + load(part + r * kPanelColumns<F> + v);
        store(c + r * c_stride + v, sum);
      }
    }
  }
#endif
}

}  // namespace
}  // namespace snoopi
