// Products of rows with packed weights, what is before them (LayerNorm), and how they leave: with
// bias and residual, or gated.
#pragma once

#include "linear.h"
#include "pack.h"

namespace snoopi {
namespace {

// x 0.5 (1 + erf(x / sqrt 2)); erf by formula 7.1.26 of Abramowitz and Stegun, within 1.5e-7, or
// 1e-4 of 1 - erf if it need not be exact.
template <bool kExact>
inline VecF gelu(VecF x) {
  const VecF y = greater(x, -x) * 0.70710678f;  // |x| / sqrt 2
  VecF e[1] = {y * y * static_cast<float>(-kLog2E)};
  exp2_nonpositive<kExact, 1>(e);
  VecF t = y * 0.3275911f + 1.0f;
#if defined(__AVX512F__)
  t = kExact ? 1.0f / t : (VecF)_mm512_rcp14_ps((__m512)t);
#else
  t = 1.0f / t;
#endif
  VecF p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const VecF below = p * t * e[0] * 0.5f;  // of -|x|: 0.5 (1 - erf)
  return x * (x > 0 ? 1.0f - below : below);
}
template <bool kExact>
inline VecD gelu(VecD x) {
  for (int i = 0; i < kWidth<double>; ++i) {
    x[i] *= 0.5 * (1 + __builtin_erf(x[i] * 0.70710678118654752440));
  }
  return x;
}

// What rows are multiplied with, and where they go.
template <typename F>
struct Projection {
  const typename F::Unit* weight;  // panels of the columns from 0 on
  int64_t c_in, c_out;
  const typename F::Acc* added;   // [c_out], or null
  const typename F::T* residual;  // [rows c_out] from the first row on, or null
  typename F::T* out;             // as the residual; [rows c_out / 2] if gated
  bool gated;
};

// Rows of a whole panel.
template <typename F, bool kResidual>
void leave_rows(const typename F::Acc* y, const Vec<typename F::Acc>* added,
                const typename F::T* residual, int64_t count, int64_t stride, typename F::T* out) {
  typedef typename F::Acc Acc;
  static_assert(kPanelVectors == 2);
  const Vec<Acc> first = added[0], second = added[1];
  for (int64_t i = 0; i < count; ++i, y += kPanelColumns<F>, out += stride) {
    Vec<Acc> low = load(y) + first, high = load(y + W<F>) + second;
    if constexpr (kResidual) {
      low += widen_load(residual + i * stride);
      high += widen_load(residual + i * stride + W<F>);
    }
    narrow_store(low, out);
    narrow_store(high, out + W<F>);
  }
}

// The products of rows [r, r + count) with the panel of columns from j on.
template <typename F>
void leave_panel(const Projection<F>& to, int64_t r, int64_t count, int64_t j,
                 const typename F::Acc* y) {
  typedef typename F::T T;
  typedef typename F::Acc Acc;
  constexpr int kW = W<F>;
  const int64_t columns = to.c_out - j;
  Vec<Acc> added[kPanelVectors] = {};
  for (int v = 0; v < kPanelVectors && to.added != nullptr && v * kW < columns; ++v) {
    added[v] = widen_load<Acc>(to.added + j + v * kW, columns - v * kW);
  }
  if (to.gated) {
    T* out = to.out + r * (to.c_out / 2) + j / 2;
    for (int64_t i = 0; i < count; ++i, y += kPanelColumns<F>, out += to.c_out / 2) {
      const Vec<Acc> gate = load(y + kW) + added[1];
      narrow_store((load(y) + added[0]) * gelu<F::kExactExp>(gate), out);
    }
    return;
  }
  T* out = to.out + r * to.c_out + j;
  const T* residual = to.residual == nullptr ? nullptr : to.residual + r * to.c_out + j;
  if (columns >= kPanelColumns<F>) {
    const auto leave = residual == nullptr ? leave_rows<F, false> : leave_rows<F, true>;
    return leave(y, added, residual, count, to.c_out, out);
  }
  for (int64_t i = 0; i < count; ++i, y += kPanelColumns<F>, out += to.c_out) {
    for (int v = 0; v < kPanelVectors && v * kW < columns; ++v) {
      Vec<Acc> sum = load(y + v * kW) + added[v];
      if (residual != nullptr) {
        sum += widen_load<Acc>(residual + i * to.c_out + v * kW, columns - v * kW);
      }
      narrow_store<Acc>(sum, out + v * kW, columns - v * kW);
    }
  }
}

// Rows times the columns [j_begin, j_end), panel by panel. There is room for whole blocks of rows;
// y holds one block's products with a panel.
template <typename F>
void project_rows(const typename F::Unit* rows, int64_t stride, int64_t num_rows, int64_t j_begin,
                  int64_t j_end, const Projection<F>& to, typename F::Acc* y) {
  const int64_t units = depth_units<F>(to.c_in);
  const int64_t steps = (to.c_in + F::kPerUnit - 1) / F::kPerUnit;
  for (int64_t j = j_begin; j < j_end; j += kPanelColumns<F>) {
    const int64_t left = to.c_out - j;
    const int64_t columns = left < kPanelColumns<F> ? left : kPanelColumns<F>;
    const Panels<F> panel = {to.weight + j * units, units, 0, steps, vectors_of<F>(columns)};
    for (int64_t r = 0; r < num_rows; r += kBlockRows) {
      const int64_t count = num_rows - r < kBlockRows ? num_rows - r : kBlockRows;
      multiply_in_runs<F>(rows + r * stride, stride, count, panel, y, kPanelColumns<F>);
      leave_panel<F>(to, r, count, j, y);
    }
  }
}

// Rows, each brought to mean 0 and variance 1 over its channels, times gain, plus offset. A
// vector's lanes of rows go together, so that their means and variances are one vector's work.
template <typename F>
void normalize_rows(const Linear& call, const typename F::T* x, int64_t rows, int64_t stride,
                    typename F::Element* to) {
  typedef typename F::Acc Acc;
  constexpr int kW = W<F>;
  const Acc* gain = static_cast<const Acc*>(call.gain);
  const Acc* offset = static_cast<const Acc*>(call.offset);
  const Vec<Acc> share = splat(1 / static_cast<Acc>(call.c_in));
  const auto plus = [](Vec<Acc> a, Vec<Acc> b) { return a + b; };
  for (int64_t first = 0; first < rows; first += kW) {
    const int64_t count = rows - first < kW ? rows - first : kW;
    Vec<Acc> by_row[kW] = {};
    alignas(64) Acc mean[kW], by[kW];
    for (int64_t r = 0; r < count; ++r) {
      const typename F::T* row = x + (first + r) * call.c_in;
      Vec<Acc> sum = {}, more = {};
      for (int64_t c = 0; c < call.c_in; c += 2 * kW) {
        sum += widen_load(row + c);
        more += widen_load(row + c + kW);
      }
      by_row[r] = sum + more;
    }
    store(mean, fold_rows<Acc>(by_row, plus) * share);
    for (int64_t r = 0; r < count; ++r) {
      const typename F::T* row = x + (first + r) * call.c_in;
      Vec<Acc> sum = {}, more = {};
      for (int64_t c = 0; c < call.c_in; c += 2 * kW) {
        const Vec<Acc> y = widen_load(row + c) - mean[r], z = widen_load(row + c + kW) - mean[r];
        sum += y * y;
        more += z * z;
      }
      by_row[r] = sum + more;
    }
    const Vec<Acc> variance = fold_rows<Acc>(by_row, plus) * share;
    for (int i = 0; i < kW; ++i) {
      by[i] = 1 / square_root(variance[i] + static_cast<Acc>(call.eps));
    }
    for (int64_t r = 0; r < count; ++r) {
      const typename F::T* row = x + (first + r) * call.c_in;
      typename F::Element* out = to + (first + r) * stride;
      const Vec<Acc> scale = splat(by[r]), shift = splat(-mean[r] * by[r]);
      for (int64_t c = 0; c < call.c_in; c += kW) {
        const Vec<Acc> z = widen_load(row + c) * scale + shift;
        narrow_store(z * load(gain + c) + load(offset + c), out + c);
      }
    }
  }
}

template <typename F>
struct LinearScratch {
  typename F::Unit* rows;  // [rows, stride]
  typename F::Acc* y;      // [block, panel]
  int64_t stride;          // units
};

template <typename F>
int64_t lay_out(const Linear& call, int64_t rows, char* memory, LinearScratch<F>* scratch) {
  // Strides of a power of two would crowd few sets of the caches.
  scratch->stride = depth_units<F>(call.c_in) + 16;
  const int64_t units = round_up(rows, kBlockRows) * scratch->stride;
  const int64_t used = round_up(units * static_cast<int64_t>(sizeof(typename F::Unit)), 64);
  scratch->rows = reinterpret_cast<typename F::Unit*>(memory);
  scratch->y = reinterpret_cast<typename F::Acc*>(memory + used);
  return used + kBlockRows * kPanelColumns<F> * static_cast<int64_t>(sizeof(typename F::Acc));
}

template <typename F>
void run_linear(const Linear& call, const LinearTask& task, void* memory) {
#if defined(SNOOPI_AMX)
  const Tiles tiles;
#endif
  typedef typename F::T T;
  LinearScratch<F> scratch = {};
  const int64_t rows = task.end - task.begin, width = call.gated ? call.c_out / 2 : call.c_out;
  lay_out(call, rows, static_cast<char*>(memory), &scratch);
  const T* x = static_cast<const T*>(call.x) + task.begin * call.c_in;
  if (call.gain != nullptr) {
    normalize_rows<F>(call, x, rows, scratch.stride * F::kPerUnit,
                      reinterpret_cast<typename F::Element*>(scratch.rows));
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      fill_units<F>(x + r * call.c_in, call.c_in, scratch.rows + r * scratch.stride,
                    depth_units<F>(call.c_in));
    }
  }
  const T* residual = static_cast<const T*>(call.residual);
  const Projection<F> to = {
      static_cast<const typename F::Unit*>(call.weight),
      call.c_in,
      call.c_out,
      static_cast<const typename F::Acc*>(call.added),
      residual == nullptr ? nullptr : residual + task.begin * width,
      static_cast<T*>(call.out) + task.begin * width,
      call.gated,
  };
  project_rows<F>(scratch.rows, scratch.stride, rows, task.j_begin, task.j_end, to, scratch.y);
}

template <typename F>
int64_t linear_scratch(const Linear& call, int64_t rows) {
  LinearScratch<F> scratch = {};
  return lay_out(call, rows, nullptr, &scratch);
}

// Most rows of a task, which are to stay in the second cache while the weights stream past.
template <typename F>
int64_t linear_rows(int64_t c_in) {
#if defined(SNOOPI_AMX)
  constexpr int64_t kRoom = 5 << 18, kMost = 256;
#else
  constexpr int64_t kRoom = 1 << 19, kMost = 144;
#endif
  const int64_t rows = kRoom / (c_in * static_cast<int64_t>(sizeof(typename F::Element)));
  const int64_t most = rows < kMost ? rows / kBlockRows * kBlockRows : kMost;
  return most < kBlockRows ? kBlockRows : most;
}

}  // namespace
}  // namespace snoopi
