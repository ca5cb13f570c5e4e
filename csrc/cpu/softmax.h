// Exponentials and their sums of a block of rows.
#pragma once

#include "pack.h"

namespace snoopi {
namespace {

// exp(scale (s - max)) of a run of one text's products and its sum, by row. The exponent is one
// multiply-add from the products: rounding the row's shift does not matter, because every element
// has the same.
//
// Of runs that do not `begin` the text, max and sum are those of all before: max moves only where
// it would be exceeded by more than kSlack octaves (which fp32 has room for), because then what was
// summed before counts by `factor`. Returns whether it moved in any row.
template <typename F, bool kExact>
bool exponentials(int64_t rows, int64_t n, double softmax_scale, bool begin, typename F::Acc* s,
                  int64_t s_stride, typename F::Unit* p_units, int64_t p_stride,
                  typename F::Acc* max, typename F::Acc* sum, typename F::Acc* factor) {
  typedef typename F::Acc Acc;
  typedef typename F::Element Element;
  constexpr int kW = W<F>;
  constexpr Acc kSlack = 8;
  constexpr int kGroup = kW < 3 ? 2 : kBlockRows % 4 == 0 ? 4 : 3;  // rows at a time
  constexpr int64_t kLanes = kW / kGroup * kGroup;  // rows that share a vector of maxima
  static_assert(kBlockRows % kGroup == 0 && kGroup <= kW);
  const int64_t last = vectors_of<F>(n) - 1, tail = n - last * kW;
  const Acc scale = static_cast<Acc>(__builtin_fabs(softmax_scale) * kLog2E);
  const Vec<Acc> lowest = splat(static_cast<Acc>(-__builtin_inf()));
  if (softmax_scale < 0) {  // so that the largest product is the largest logit
    for (int64_t i = 0; i < rows * s_stride; ++i) s[i] = -s[i];
  }
  bool moved = false;
  // A last group may take rows past the block's last: there is room, and nobody reads the result.
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t end = rows < first + kLanes ? rows : first + kLanes;
    Vec<Acc> by_row[kW] = {};
    for (int64_t r = first; r < end; r += kGroup) {
      const Acc* row = s + r * s_stride;
      Vec<Acc> largest[kGroup];
#pragma GCC unroll 4
      for (int i = 0; i < kGroup; ++i) {
        largest[i] = first_lanes<Acc>(tail, load(row + i * s_stride + last * kW), lowest);
      }
      for (int64_t v = 0; v < last; ++v) {
#pragma GCC unroll 4
        for (int i = 0; i < kGroup; ++i) {
          largest[i] = greater(load(row + i * s_stride + v * kW), largest[i]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kGroup; ++i) by_row[r - first + i] = largest[i];
    }
    const auto larger = [](Vec<Acc> a, Vec<Acc> b) { return greater(a, b); };
    const Vec<Acc> found = splat(scale) * fold_rows<Acc>(by_row, larger);
    if (begin) {
      store(max + first, found);
    } else {
      const Vec<Acc> before = load(max + first);
      const auto far = found > before + splat(kSlack);
      Vec<Acc> shrinks[1] = {far ? before - found : Vec<Acc>{}};
      exp2_nonpositive<true, 1>(shrinks);
      store(factor + first, shrinks[0]);
      store(max + first, far ? found : before);
      for (int64_t r = 0; r < end - first; ++r) moved |= far[r] != 0;
    }
    for (int64_t r = first; r < end; r += kGroup) {
      const Acc* row = s + r * s_stride;
      Element* p = reinterpret_cast<Element*>(p_units + r * p_stride);
      Vec<Acc> shift[kGroup], total[kGroup] = {};
#pragma GCC unroll 4
      for (int i = 0; i < kGroup; ++i) shift[i] = splat(max[r + i]);
      for (int64_t v = 0; v <= last; ++v) {
        Vec<Acc> x[kGroup];
#pragma GCC unroll 4
        for (int i = 0; i < kGroup; ++i) {
          x[i] = load(row + i * s_stride + v * kW) * splat(scale) - shift[i];
        }
        exp2_nonpositive<kExact, kGroup>(x);
        if (v == last) {
#pragma GCC unroll 4
          for (int i = 0; i < kGroup; ++i) x[i] = first_lanes<Acc>(tail, x[i], Vec<Acc>{});
        }
#pragma GCC unroll 4
        for (int i = 0; i < kGroup; ++i) {
          narrow_store(x[i], p + i * p_stride * F::kPerUnit + v * kW);
          total[i] += x[i];
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kGroup; ++i) {
        by_row[r - first + i] = total[i];
        if (F::kPerUnit > 1 && last % 2 == 0) {  // the depth is a whole number of pairs of vectors
          narrow_store(Vec<Acc>{}, p + i * p_stride * F::kPerUnit + (last + 1) * kW);
        }
      }
    }
    Vec<Acc> all = fold_rows<Acc>(by_row, [](Vec<Acc> a, Vec<Acc> b) { return a + b; });
    if (!begin) all += load(sum + first) * load(factor + first);
    store(sum + first, all);
  }
  return moved;
}

}  // namespace
}  // namespace snoopi
