// Products of a few rows with packed panels: c[r][j] = sum over k of a[r][k] b[k][j].
//
// `a` is row-major and read by broadcast, so queries are used where they lie. `b` is cut into panels
// of two vectors of columns (the last may be one), each contiguous over the depth, so that a step
// of depth is two loads. With 12 rows 24 accumulators fill AVX-512's registers, and a step's 24
// multiply-adds hide its 14 loads. Every element is one chain of multiply-adds over the depth in
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

#if defined(__AVX512BF16__)
inline VecF multiply_add(VecF sum, uint32_t a, VecF b) {
  return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)),
                                (__m512bh)b);
}
#endif

// A block of kRows rows and kVectors vectors of columns.
template <typename F, int kRows, int kVectors>
inline void multiply_block(const typename F::Unit* a, int64_t a_stride, const typename F::Unit* b,
                           int64_t steps, typename F::Acc* c, int64_t c_stride) {
  typedef typename F::Acc Acc;
  typedef typename F::Unit Unit;
  constexpr int W = kWidth<Acc>;
  Vec<Acc> sum[kRows][kVectors] = {};
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
                          const typename F::Unit* b, int64_t depth, int64_t steps,
                          int64_t vectors, typename F::Acc* c, int64_t c_stride) {
  constexpr int W = kWidth<typename F::Acc>;
  if (rows == kRows) {
    int64_t v = 0;
    for (; v + 1 < vectors; v += 2) {
      multiply_block<F, kRows, 2>(a, a_stride, b + v * W * depth, steps, c + v * W, c_stride);
    }
    if (v < vectors) {
      multiply_block<F, kRows, 1>(a, a_stride, b + v * W * depth, steps, c + v * W, c_stride);
    }
  } else if constexpr (kRows > 1) {
    multiply_rows<F, kRows - 1>(a, a_stride, rows, b, depth, steps, vectors, c, c_stride);
  }
}

// Rows [0, rows) of a times all panels of b. rows is at most kBlockRows, b has `vectors` vectors of
// columns and panels of `depth` units, of which `steps` are multiplied; the others are zero. a, b and
// their strides are in units. AMX multiplies whole tiles: a and c have room for kBlockRows rows
// there, and a is `depth` deep.
template <typename F>
inline void multiply(const typename F::Unit* a, int64_t a_stride, int64_t rows,
                     const typename F::Unit* b, int64_t depth, int64_t steps, int64_t vectors,
                     typename F::Acc* c, int64_t c_stride) {
#if defined(SNOOPI_AMX)
  multiply_tiles(a, a_stride, rows, b, depth, vectors, c, c_stride);
  (void)steps;
#else
  multiply_rows<F, kBlockRows>(a, a_stride, rows, b, depth, steps, vectors, c, c_stride);
#endif
}

}  // namespace
}  // namespace snoopi
