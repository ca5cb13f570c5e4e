// Vectors of the accumulator's type, as wide as the processor the file is compiled for.
//
// Compiler vector extensions only: nothing here is shared with another object, and nothing of the
// C++ library is used, because an inline function compiled for AVX-512 in this object could be the
// copy the linker keeps for every other one.
#pragma once

#include <stdint.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>  // always inlined: nothing another object could pick
#endif

namespace snoopi {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecI64 __attribute__((vector_size(kVectorBytes)));

template <typename Acc>
struct VecOf;
template <>
struct VecOf<float> {
  typedef VecF Type;
  typedef VecI32 Bits;
};
template <>
struct VecOf<double> {
  typedef VecD Type;
  typedef VecI64 Bits;
};
template <typename Acc>
using Vec = typename VecOf<Acc>::Type;

template <typename Acc>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(Acc));

template <typename Acc>
inline Vec<Acc> load(const Acc* from) {
  Vec<Acc> x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

template <typename Acc>
inline void store(Acc* to, Vec<Acc> x) {
  __builtin_memcpy(to, &x, sizeof(x));
}

template <typename Acc>
inline Vec<Acc> splat(Acc x) {
  return x - Vec<Acc>{};
}

// Of equal or unordered lanes the second, so that a NaN in `a` leaves `b` alone.
template <typename V>
inline V greater(V a, V b) {
  return a > b ? a : b;
}

// 2^x for x <= 0; below 2^-125 it stays there. NaN stays NaN. Within 2e-8 of its value, or 3e-6 if
// it need not be `kExact`, which is plenty where the result is rounded to bf16.
template <bool kExact>
inline VecF exp2_nonpositive(VecF x) {
  x = x < -125.0f ? splat(-125.0f) : x;
  // Adding 1.5 * 2^23 rounds to an integer, held in the low bits; + 127 is the exponent's bias.
  const float magic = 12582912.0f + 127.0f;
  const VecF shifted = x + magic;
  const VecF f = x - (shifted - magic);  // [-0.5 0.5]
  VecF p;
  if constexpr (kExact) {
    p = splat(0x1.41d334p-13f);
    p = p * f + 0x1.5f456ap-10f;
    p = p * f + 0x1.3b2dbcp-7f;
    p = p * f + 0x1.c6aed4p-5f;
    p = p * f + 0x1.ebfbdap-3f;
    p = p * f + 0x1.62e430p-1f;
    p = p * f + 1.0f;
  } else {
    p = splat(0x1.3997d6p-7f);
    p = p * f + 0x1.ca1440p-5f;
    p = p * f + 0x1.ec06dap-3f;
    p = p * f + 0x1.62e0dcp-1f;
    p = p * f + 0x1.ffffe8p-1f;
  }
  const VecI32 bits = (VecI32)shifted << 23;
  return p * (VecF)bits;
}

template <bool kExact>
inline VecD exp2_nonpositive(VecD x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

inline float log2_of(float x) { return __builtin_log2f(x); }
inline double log2_of(double x) { return __builtin_log2(x); }

#if defined(__clang__)
#define SNOOPI_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SNOOPI_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bits{__VA_ARGS__})
#endif

// The lower (upper) halves of a and b, interleaved: a0 b0 a1 b1 ...
template <typename Acc, bool kUpper>
inline Vec<Acc> interleave(Vec<Acc> a, Vec<Acc> b) {
  typedef typename VecOf<Acc>::Bits Bits [[maybe_unused]];
  constexpr int W = kWidth<Acc>, s = kUpper ? W / 2 : 0;
  if constexpr (W == 2) {
    return SNOOPI_SHUFFLE(a, b, s, s + W);
  } else if constexpr (W == 4) {
    return SNOOPI_SHUFFLE(a, b, s, s + W, s + 1, s + 1 + W);
  } else if constexpr (W == 8) {
    return SNOOPI_SHUFFLE(a, b, s, s + W, s + 1, s + 1 + W, s + 2, s + 2 + W, s + 3, s + 3 + W);
  } else {
    static_assert(W == 16);
    return SNOOPI_SHUFFLE(a, b, s, s + W, s + 1, s + 1 + W, s + 2, s + 2 + W, s + 3, s + 3 + W,
                          s + 4, s + 4 + W, s + 5, s + 5 + W, s + 6, s + 6 + W, s + 7, s + 7 + W);
  }
}

// to[c][r] = from[r][c] for a square of one vector's width. Each of log2(W) rounds is one perfect
// shuffle of the whole square.
template <typename Acc>
inline void transpose_square(const Acc* from, int64_t from_stride, Acc* to, int64_t to_stride) {
  constexpr int W = kWidth<Acc>;
  Vec<Acc> x[W], y[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) x[i] = load(from + i * from_stride);
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = interleave<Acc, false>(x[i], x[i + W / 2]);
      y[2 * i + 1] = interleave<Acc, true>(x[i], x[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(to + i * to_stride, x[i]);
}

// Lane i of `a` where i < count, elsewhere that of `b`.
template <typename Acc>
inline Vec<Acc> first_lanes(int64_t count, Vec<Acc> a, Vec<Acc> b) {
  typedef typename VecOf<Acc>::Bits Bits;
  Bits lane;
  for (int i = 0; i < kWidth<Acc>; ++i) lane[i] = i;
  return lane < static_cast<decltype(+lane[0])>(count) ? a : b;
}

// Lane i of the result is lane (i + by) % W of x.
template <typename Acc, int by>
inline Vec<Acc> rotate(Vec<Acc> x) {
  constexpr int W = kWidth<Acc>;
#if defined(__clang__)
  Vec<Acc> y;
  for (int i = 0; i < W; ++i) y[i] = x[(i + by) % W];
  return y;
#else
  typename VecOf<Acc>::Bits from;
  for (int i = 0; i < W; ++i) from[i] = (i + by) % W;
  return __builtin_shuffle(x, from);
#endif
}

// All lanes folded into one.
template <typename Acc, typename Fold>
inline Acc fold_lanes(Vec<Acc> x, Fold fold) {
  constexpr int W = kWidth<Acc>;
  if constexpr (W > 8) x = fold(x, rotate<Acc, 8>(x));
  if constexpr (W > 4) x = fold(x, rotate<Acc, 4>(x));
  if constexpr (W > 2) x = fold(x, rotate<Acc, 2>(x));
  return fold(x, rotate<Acc, 1>(x))[0];
}

}  // namespace
}  // namespace snoopi
