// What convolutions in channels-last pictures have in common, whatever multiplies: the norm and
// activation before the products, what leaves after them, and the moments that make a GroupNorm.
// convolve_vectors.h and convolve_tiles.h hold the products; a kernel has one of them.
#pragma once

#include "conv.h"
#include "pack.h"

namespace snoopi {
namespace {

// Source pixels that a block of `tiles` tiles in a row reads, and where they begin before it.
inline int64_t patch_side(ConvKind kind, int64_t tiles) {
  return (kind == ConvKind::kWinograd ? 2 * tiles : tiles) + 2;
}
inline int64_t patch_begin(ConvKind kind, int64_t tile) {
  return (kind == ConvKind::kWinograd ? 2 * tile : tile) - 1;
}

// x[i] = x[i] sigmoid(x[i]); to 2^-13 of it where it need not be exact.
template <typename F, int kCount>
inline void silu(Vec<typename F::Acc>* x) {
  typedef typename F::Acc Acc;
  Vec<Acc> e[kCount];
#if defined(__AVX512F__)
  if constexpr (!F::kExactExp) {  // an exponent past the range becomes 0 or infinity, as it should
    __m512 whole[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      e[i] = x[i] * static_cast<Acc>(-kLog2E);
      whole[i] = _mm512_roundscale_ps((__m512)e[i], 0);
      e[i] -= (VecF)whole[i];
    }
    VecF p[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) p[i] = splat(kNearTerms[0]);
#pragma GCC unroll 4
    for (int term = 1; term < kNearCount; ++term) {
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) p[i] = p[i] * e[i] + kNearTerms[term];
    }
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const VecF power = (VecF)_mm512_scalef_ps((__m512)p[i], whole[i]);
      x[i] *= (VecF)_mm512_rcp14_ps((__m512)(power + 1.0f));
    }
    return;
  }
#endif
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    e[i] = greater(x[i], -x[i]) * static_cast<Acc>(-kLog2E);  // of -|x|
  }
  exp2_nonpositive<F::kExactExp, kCount>(e);
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) x[i] *= (x[i] > 0 ? splat(Acc(1)) : e[i]) / (e[i] + 1);
}

// A task's input, normalized and activated: channels [begin, end) of [rows, columns] pixels, in
// parts of `chunk` channels that lie `chunk_stride` apart. A pixel's channels come in one go, since
// that is how they lie in memory.
template <typename F, bool kNorm, bool kSiLU, typename To>
void fill_patch(const Conv& call, const ConvTask& task, int64_t begin, int64_t end, To* patch,
                int64_t chunk, int64_t chunk_stride) {
  typedef typename F::T T;
  typedef typename F::Acc Acc;
  constexpr int kW = W<F>;
  constexpr int kVectors = kConvChannels / kW;
  constexpr int kGroup = kVectors < 4 ? kVectors : 4;
  const int64_t rows = patch_side(call.kind, task.y_end - task.y_begin);
  const int64_t columns = patch_side(call.kind, task.x_end - task.x_begin);
  const int64_t top = patch_begin(call.kind, task.y_begin);
  const int64_t left = patch_begin(call.kind, task.x_begin);
  const T* x = static_cast<const T*>(call.x) + task.b * call.h * call.w * call.c_in;
  const Acc* scale = nullptr;
  const Acc* shift = nullptr;
  if constexpr (kNorm) {
    scale = static_cast<const Acc*>(call.scale) + task.b * call.norm_stride;
    shift = static_cast<const Acc*>(call.shift) + task.b * call.norm_stride;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t y = top + i;
    for (int64_t j = 0; j < columns; ++j, patch += chunk) {
      const int64_t at = left + j;
      const bool inside = y >= 0 && y < call.h && at >= 0 && at < call.w;
      const T* from = x + (y * call.w + at) * call.c_in;
      To* to = patch;
      for (int64_t c = begin; c < end; to += chunk_stride) {
        for (const int64_t stop = c + chunk; c < stop; c += kGroup * kW) {
          Vec<Acc> z[kGroup] = {};
          if (inside) {
#pragma GCC unroll 4
            for (int v = 0; v < kGroup; ++v) {
              z[v] = widen_load(from + c + v * kW);
              if constexpr (kNorm) {
                z[v] = z[v] * load(scale + c + v * kW) + load(shift + c + v * kW);
              }
            }
            if constexpr (kSiLU) silu<F, kGroup>(z);
          }
#pragma GCC unroll 4
          for (int v = 0; v < kGroup; ++v) narrow_store(z[v], to + (chunk - (stop - c)) + v * kW);
        }
      }
    }
  }
}

template <typename F, typename To>
void fill_patch(const Conv& call, const ConvTask& task, int64_t begin, int64_t end, To* patch,
                int64_t chunk, int64_t chunk_stride) {
  const auto fill = call.scale == nullptr ? call.silu ? fill_patch<F, false, true, To>
                                                      : fill_patch<F, false, false, To>
                    : call.silu           ? fill_patch<F, true, true, To>
                                          : fill_patch<F, true, false, To>;
  fill(call, task, begin, end, patch, chunk, chunk_stride);
}

// kVectors vectors of channels from `c` on.
template <typename F, int kVectors>
void add_moments(const Moments& call, int64_t begin, int64_t end, int64_t c) {
  typedef typename F::T T;
  typedef typename F::Acc Acc;
  constexpr int kW = W<F>;
  const Acc* about = static_cast<const Acc*>(call.about) + c;
  Vec<Acc> sum[kVectors] = {}, squares[kVectors] = {};
  for (int64_t i = begin; i < end; ++i) {
    const T* from = static_cast<const T*>(call.x) + i * call.c + c;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Vec<Acc> z = widen_load(from + v * kW) - load(about + v * kW);
      sum[v] += z;
      squares[v] += z * z;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    store(static_cast<Acc*>(call.sum) + c + v * kW, sum[v]);
    store(static_cast<Acc*>(call.squares) + c + v * kW, squares[v]);
  }
}

template <typename F>
void add_moments(const Moments& call, int64_t begin, int64_t end) {
  constexpr int kW = W<F>;
  constexpr int kFew = kConvChannels / kW < 8 ? kConvChannels / kW : 8;
  int64_t c = 0;
  for (; c + 8 * kW <= call.c; c += 8 * kW) add_moments<F, 8>(call, begin, end, c);
  for (; c < call.c; c += kFew * kW) add_moments<F, kFew>(call, begin, end, c);
}

}  // namespace
}  // namespace snoopi
