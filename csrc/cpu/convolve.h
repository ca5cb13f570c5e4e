// Convolutions in channels-last pictures, with the norm and activation before them and the sums
// after them.
//
// A task is a block of tiles of output pixels. By chunks of kConvChannels, its input and a pixel
// around it are normalized and activated into the first cache, in the accumulator's type, and from
// there transformed to the rows of the products, rounded once. The rows of all channels and
// positions stay in the second cache while the weights stream past, panel by panel; the products
// of a panel are transformed back and leave as pixels.
#pragma once

#include "conv.h"
#include "pack.h"
#include "softmax.h"

namespace snoopi {
namespace {

template <typename F>
struct ConvScratch {
  typename F::Acc* patch;    // [rows, columns, kConvChannels]: activated input
  typename F::Unit* a;       // [positions, tiles, stride]: rows of the products
  typename F::Acc* c;        // [tiles, c_stride]: products of a panel, all positions
  typename F::Acc* moments;  // [patch, 2]: by_pixel's, as x * first + second
  int64_t tiles, stride, c_stride;
};

// Source pixels that a block of `tiles` tiles in a row reads, and where they begin before it.
inline int64_t patch_side(ConvKind kind, int64_t tiles) {
  if (kind == ConvKind::kPointwise) return tiles;
  return (kind == ConvKind::kWinograd ? 2 * tiles : tiles) + 2;
}
inline int64_t patch_begin(ConvKind kind, int64_t tile) {
  if (kind == ConvKind::kPointwise) return tile;
  return (kind == ConvKind::kWinograd ? 2 * tile : tile) - 1;
}

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
  take(&scratch->moments, call.by_pixel ? 2 * patch : 0);
  return used;
}

// x[i] = x[i] sigmoid(x[i]); to 2^-14 of it where it need not be exact.
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
    for (int term = 1; term < 5; ++term) {
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

enum class Norm { kNone, kChannel, kPixel };

// A task's input, normalized and activated: channels [begin, end) of [rows, columns] pixels, in
// parts of `chunk` channels that lie `chunk_stride` apart. A pixel's channels come in one go, since
// that is how they lie in memory.
template <typename F, Norm kNorm, bool kSiLU, typename To>
void fill_patch(const Conv& call, const ConvTask& task, int64_t begin, int64_t end,
                const typename F::Acc* moments, To* patch, int64_t chunk, int64_t chunk_stride) {
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
  if constexpr (kNorm != Norm::kNone) {
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
      Vec<Acc> by_pixel[2] = {};
      if constexpr (kNorm == Norm::kPixel) {
        for (int k = 0; k < 2; ++k) by_pixel[k] = splat(moments[2 * (i * columns + j) + k]);
      }
      for (int64_t c = begin; c < end; to += chunk_stride) {
        for (const int64_t stop = c + chunk; c < stop; c += kGroup * kW) {
          Vec<Acc> z[kGroup] = {};
          if (inside) {
#pragma GCC unroll 4
            for (int v = 0; v < kGroup; ++v) {
              z[v] = widen_load(from + c + v * kW);
              if constexpr (kNorm == Norm::kPixel) z[v] = z[v] * by_pixel[0] + by_pixel[1];
              if constexpr (kNorm != Norm::kNone) {
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
void fill_patch(const Conv& call, const ConvTask& task, int64_t begin, int64_t end,
                const typename F::Acc* moments, To* patch, int64_t chunk, int64_t chunk_stride) {
  const auto fill = call.by_pixel           ? fill_patch<F, Norm::kPixel, false, To>
                    : call.scale == nullptr ? call.silu ? fill_patch<F, Norm::kNone, true, To>
                                                        : fill_patch<F, Norm::kNone, false, To>
                    : call.silu             ? fill_patch<F, Norm::kChannel, true, To>
                                            : fill_patch<F, Norm::kChannel, false, To>;
  fill(call, task, begin, end, moments, patch, chunk, chunk_stride);
}

// x * first + second has mean 0 and variance 1 over a pixel's channels; of a kPointwise task.
template <typename F>
void pixel_moments(const Conv& call, const ConvTask& task, typename F::Acc* moments) {
  typedef typename F::T T;
  typedef typename F::Acc Acc;
  constexpr int kW = W<F>;
  const T* x = static_cast<const T*>(call.x) + (task.b * call.w + task.x_begin) * call.c_in;
  const auto total = [](Vec<Acc> sum) {
    Acc all = 0;
    for (int lane = 0; lane < kW; ++lane) all += sum[lane];
    return all;
  };
  for (int64_t i = task.x_begin; i < task.x_end; ++i, x += call.c_in, moments += 2) {
    Vec<Acc> sum = {}, more = {};
    for (int64_t c = 0; c < call.c_in; c += 2 * kW) {
      sum += widen_load(x + c);
      more += widen_load(x + c + kW);
    }
    const Acc mean = total(sum + more) / static_cast<Acc>(call.c_in);
    Vec<Acc> squares = {}, others = {};
    for (int64_t c = 0; c < call.c_in; c += 2 * kW) {
      const Vec<Acc> y = widen_load(x + c) - mean, z = widen_load(x + c + kW) - mean;
      squares += y * y;
      others += z * z;
    }
    const Acc variance = total(squares + others) / static_cast<Acc>(call.c_in);
    moments[0] = 1 / square_root(variance + static_cast<Acc>(call.eps));
    moments[1] = -mean * moments[0];
  }
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

// Rows of the products from the patch of a chunk: B^T d B of every tile, or its pixels.
template <typename F, ConvKind kKind>
void fill_rows(const ConvTask& task, int64_t channel, int64_t c_in, const ConvScratch<F>& scratch) {
  typedef typename F::Acc Acc;
  typedef typename F::Element Element;
  constexpr int kW = W<F>;
  constexpr bool kTransforms = kKind == ConvKind::kWinograd || kKind == ConvKind::kDoubled;
  constexpr int kSide = kKind == ConvKind::kWinograd ? 4 : kKind == ConvKind::kPointwise ? 1 : 3;
  constexpr int64_t kStep = kKind == ConvKind::kWinograd ? 2 : 1;  // of tiles in the patch
  const int64_t columns = patch_side(kKind, task.x_end - task.x_begin);
  const int64_t stride = scratch.stride * F::kPerUnit, chunk = chunk_of(c_in);
  Element* row = reinterpret_cast<Element*>(scratch.a) +
                 depth_at(0, kSide * kSide, channel, kTransforms ? c_in : chunk);
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
        if constexpr (kTransforms) {
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
        } else {
#pragma GCC unroll 16
          for (int p = 0; p < kSide * kSide; ++p) narrow_store(d[p], row + p * chunk + v);
        }
      }
    }
  }
}

// Vector i of a row of which `count` elements are left.
template <typename Acc, typename T>
inline Vec<Acc> widen_load(const T* from, int64_t count) {
  constexpr int kW = kWidth<Acc>;
  if (count >= kW) return widen_load(from);
  T lanes[kW] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return widen_load(lanes);
}

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

// The pair of vectors that begins at column j, value and gate, of all pixels of a pointwise task.
template <typename F>
void leave_gated(const Conv& call, const ConvTask& task, int64_t j, const typename F::Acc* value,
                 const typename F::Acc* gate, int64_t stride) {
  typedef typename F::T T;
  typedef typename F::Acc Acc;
  constexpr int kW = W<F>;
  const int64_t width = call.c_out / 2;
  T* out = static_cast<T*>(call.out) + (task.b * call.w + task.x_begin) * width + j / 2;
  const Acc* added = static_cast<const Acc*>(call.added) + task.b * call.added_stride + j;
  const bool adds = call.added != nullptr;
  const Vec<Acc> of_value = adds ? load(added) : Vec<Acc>{};
  const Vec<Acc> of_gate = adds ? load(added + kW) : Vec<Acc>{};
  for (int64_t i = task.x_begin; i < task.x_end; ++i, out += width) {
    narrow_store((load(value) + of_value) * gelu<F::kExactExp>(load(gate) + of_gate), out);
    value += stride, gate += stride;
  }
}

// Columns [j, j + columns) of the output pixels of all tiles from their products.
template <typename F, ConvKind kKind>
void leave(const Conv& call, const ConvTask& task, int64_t j, int64_t columns,
           const ConvScratch<F>& scratch) {
  typedef typename F::T T;
  typedef typename F::Acc Acc;
  constexpr int kW = W<F>;
  constexpr bool kTransforms = kKind == ConvKind::kWinograd || kKind == ConvKind::kDoubled;
  constexpr int kIn = kKind == ConvKind::kWinograd ? 4 : kKind == ConvKind::kDoubled ? 3 : 1;
  constexpr int kOut = kTransforms ? 2 : 1;
  constexpr int64_t kDouble = kKind == ConvKind::kDoubled ? 2 : 1;
  const int64_t h = call.h * kDouble, w = call.w * kDouble;
  if constexpr (kKind == ConvKind::kPointwise) {
    if (call.geglu) {
      return leave_gated<F>(call, task, j, scratch.c, scratch.c + kW, scratch.c_stride);
    }
  }
  const int64_t batch = task.b * h * w * call.c_out + j;
  T* out = static_cast<T*>(call.out) + batch;
  const T* residual = static_cast<const T*>(call.residual) + batch;
  const Acc* added = static_cast<const Acc*>(call.added) + task.b * call.added_stride + j;
  Vec<Acc> sums[kPanelVectors] = {};
  if (call.added != nullptr) {
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
        if constexpr (kTransforms) {
#pragma GCC unroll 4
          for (int i = 0; i < kIn; ++i) transform_out<kKind>(m + i, kIn, t + i, kIn);
#pragma GCC unroll 2
          for (int i = 0; i < kOut; ++i) transform_out<kKind>(t + i * kIn, 1, z + i * kOut, 1);
        } else {
          z[0] = m[0];
        }
#pragma GCC unroll 2
        for (int i = 0; i < kOut; ++i) {
#pragma GCC unroll 2
          for (int k = 0; k < kOut; ++k) {
            if (y + i >= h || x + k >= w) continue;
            const int64_t at = ((y + i) * w + x + k) * call.c_out + v;
            Vec<Acc> sum = z[i * kOut + k] + sums[v / kW];
            if (call.residual != nullptr) sum += widen_load<Acc>(residual + at, columns - v);
            narrow_store<Acc>(sum, out + at, columns - v);
          }
        }
      }
      c += scratch.c_stride;
    }
  }
}

// `multiply` with one panel, by runs of depth that are summed for themselves: one chain of
// thousands of sums would round several times as much as a sum of chains.
template <typename F>
inline void multiply_in_runs(const typename F::Unit* a, int64_t a_stride, int64_t rows,
                             const typename F::Unit* panel, int64_t units, int64_t vectors,
                             typename F::Acc* c, int64_t c_stride) {
  typedef typename F::Acc Acc;
  constexpr int64_t kRun = 256;
  alignas(64) Acc part[kBlockRows * kPanelColumns<F>];
  for (int64_t k = 0; k < units; k += kRun) {
    const int64_t steps = units - k < kRun ? units - k : kRun;
    const typename F::Unit* b = panel + k * vectors * W<F>;
    if (k == 0) {
      multiply<F>(a, a_stride, rows, b, steps, steps, vectors, c, c_stride);
      continue;
    }
    multiply<F>(a + k, a_stride, rows, b, steps, steps, vectors, part, kPanelColumns<F>);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < vectors * W<F>; v += W<F>) {
        const Vec<Acc> sum = load(c + r * c_stride + v) + load(part + r * kPanelColumns<F> + v);
        store(c + r * c_stride + v, sum);
      }
    }
  }
}

template <typename F, ConvKind kKind>
void convolve(const Conv& call, const ConvTask& task, const ConvScratch<F>& scratch) {
  constexpr int64_t kColumns = kPanelColumns<F>;
  const int64_t depth = depth_of(kKind, call.c_in), units = depth_units<F>(depth);
  const int64_t tiles = (task.y_end - task.y_begin) * (task.x_end - task.x_begin);
  const int64_t matrix = packed_units<F>(call.c_out, depth);  // of one position
  if (call.by_pixel) pixel_moments<F>(call, task, scratch.moments);
  for (int64_t channel = 0; channel < call.c_in; channel += kConvChannels) {
    fill_patch<F>(call, task, channel, channel + kConvChannels, scratch.moments, scratch.patch,
                  kConvChannels, 0);
    fill_rows<F, kKind>(task, channel, call.c_in, scratch);
  }
  const typename F::Unit* weight = static_cast<const typename F::Unit*>(call.weight);
  for (int64_t j = task.j_begin; j < task.j_end; j += kColumns) {
    const int64_t columns = task.j_end - j < kColumns ? task.j_end - j : kColumns;
    for (int p = 0; p < positions_of(kKind); ++p) {
      const typename F::Unit* panel = weight + p * matrix + j * units;
      for (int64_t t = 0; t < tiles; t += kBlockRows) {
        const int64_t rows = tiles - t < kBlockRows ? tiles - t : kBlockRows;
        multiply_in_runs<F>(scratch.a + (p * scratch.tiles + t) * scratch.stride, scratch.stride,
                            rows, panel, units, vectors_of<F>(columns),
                            scratch.c + t * scratch.c_stride + p * kColumns, scratch.c_stride);
      }
    }
    leave<F, kKind>(call, task, j, columns, scratch);
  }
}

}  // namespace
}  // namespace snoopi

#if defined(SNOOPI_AMX)
#include "convolve_tiles.h"
#endif

namespace snoopi {
namespace {

template <typename F>
void run_conv(const Conv& call, const ConvTask& task, void* memory) {
#if defined(SNOOPI_AMX)
  const Tiles tiles;
  if (by_tiles(call.kind)) return convolve_tiles(call, task, memory);
#endif
  const int64_t height = task.y_end - task.y_begin, width = task.x_end - task.x_begin;
  ConvScratch<F> scratch = {};
  const int64_t patch = patch_side(call.kind, height) * patch_side(call.kind, width);
  lay_out(call, height * width, patch, static_cast<char*>(memory), &scratch);
  switch (call.kind) {
    case ConvKind::kPointwise:
#if !defined(SNOOPI_AMX)
      return convolve<F, ConvKind::kPointwise>(call, task, scratch);
#endif
    case ConvKind::kDirect:
#if !defined(SNOOPI_AMX)
      return convolve<F, ConvKind::kDirect>(call, task, scratch);
#endif
    case ConvKind::kWinograd:
      return convolve<F, ConvKind::kWinograd>(call, task, scratch);
    case ConvKind::kDoubled:
      return convolve<F, ConvKind::kDoubled>(call, task, scratch);
    case ConvKind::kPhased:
      return;  // of the tiles' convolution alone
  }
}

template <typename F>
int64_t conv_bytes(const Conv& call, int64_t height, int64_t width) {
#if defined(SNOOPI_AMX)
  if (by_tiles(call.kind)) return tiles_bytes(call, height, width);
#endif
  ConvScratch<F> scratch = {};
  const int64_t patch = patch_side(call.kind, height) * patch_side(call.kind, width);
  return lay_out(call, height * width, patch, nullptr, &scratch);
}

// Columns of a panel of weights.
template <typename F>
int64_t conv_columns(ConvKind kind) {
#if defined(SNOOPI_AMX)
  if (by_tiles(kind)) return kTileUnits;
#endif
  (void)kind;
  return kPanelColumns<F>;
}

// The fastest way to a 3x3 convolution, of a doubled picture if `doubled`.
template <typename F>
ConvKind conv_kind(bool doubled, int64_t c_out, int64_t c_in) {
#if defined(SNOOPI_AMX)
  // Tiles multiply faster than vectors transform.
  return doubled ? ConvKind::kPhased : ConvKind::kDirect;
#endif
  if (doubled) return ConvKind::kDoubled;
  // Winograd's weights are 16/9 the size; where many channels meet few pixels, they are the cost.
  return (c_out < c_in ? c_out : c_in) <= 640 ? ConvKind::kWinograd : ConvKind::kDirect;
}

// Most tiles of a task: their rows are to stay in the second cache beside a panel of weights.
template <typename F>
int64_t conv_tiles(const Conv& call) {
#if defined(SNOOPI_AMX)
  if (by_tiles(call.kind)) return most_pixels(call);
#endif
  constexpr int64_t kRoom = kBlockRows == 32 ? 5 << 18 : 3 << 18;
  constexpr int64_t kMost = kBlockRows == 32 ? 64 : 48;
  ConvScratch<F> scratch = {};
  lay_out(call, 1, 0, nullptr, &scratch);
  const int64_t row =
      positions_of(call.kind) * scratch.stride * static_cast<int64_t>(sizeof(typename F::Unit));
  const int64_t tiles = kRoom / row / kBlockRows * kBlockRows;
  return tiles < kBlockRows ? kBlockRows : tiles < kMost ? tiles : kMost;
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
