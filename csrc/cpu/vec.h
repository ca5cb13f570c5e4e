// Vectors of the accumulator's type, as wide as the processor the file is compiled for.
//
// Compiler vector extensions only: nothing here is shared with another object, and nothing of the
// C++ library is used, because an inline function compiled for AVX-512 in this object could be the
// copy the linker keeps for every other one.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
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

// Of equal or unordered lanes the second, so that a NaN in `a` leaves `b` alone. One instruction on
// x86, which compilers do not find without leave to forget about NaN.
inline VecF greater(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline VecD greater(VecD a, VecD b) { return a > b ? a : b; }

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// 2^f on [-0.5 0.5]; the highest power comes first.
constexpr float kExactTerms[] = {0x1.41d334p-13f,
                                 0x1.5f456ap-10f,
                                 0x1.3b2dbcp-7f,
                                 0x1.c6aed4p-5f,
                                 0x1.ebfbdap-3f,
                                 0x1.62e430p-1f,
                                 1.0f};
constexpr float kNearTerms[] = {0x1.c3f760p-5f, 0x1.f0de1ap-3f, 0x1.62f31ap-1f, 0x1.fff692p-1f};
constexpr int kExactCount = sizeof(kExactTerms) / sizeof(float);
constexpr int kNearCount = sizeof(kNearTerms) / sizeof(float);

// x[i] = 2^x[i] for x <= 0 (and up to 127); below 2^-125 it stays there. NaN stays NaN. Within 2e-8
// of its value, or 8e-5 if it need not be `kExact`, where it is rounded to bf16 (2e-3). Several at
// a time, because the chain of one is long and a processor's queues are short.
template <bool kExact, int kCount>
inline void exp2_nonpositive(VecF* x) {
  // Adding 1.5 * 2^23 rounds to an integer, held in the low bits; + 127 is the exponent's bias.
  const float magic = 12582912.0f + 127.0f;
  constexpr int kTerms = kExact ? kExactCount : kNearCount;
  constexpr const float* kTerm = kExact ? kExactTerms : kNearTerms;
  VecF shifted[kCount], p[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) x[i] = greater(splat(-125.0f), x[i]);
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) shifted[i] = x[i] + magic;
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) x[i] -= shifted[i] - magic;
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) p[i] = splat(kTerm[0]);
#pragma GCC unroll 8
  for (int term = 1; term < kTerms; ++term) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) p[i] = p[i] * x[i] + kTerm[term];
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) x[i] = p[i] * (VecF)((VecI32)shifted[i] << 23);
}

template <bool kExact, int kCount>
inline void exp2_nonpositive(VecD* x) {
  for (int i = 0; i < kCount; ++i) {
    for (int lane = 0; lane < kWidth<double>; ++lane) x[i][lane] = __builtin_exp2(x[i][lane]);
  }
}

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }
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

// Lane r of the result is all lanes of x[r] folded into one. x is used up. Every round folds pairs
// of vectors into one, whose lanes alternate between the two.
template <typename Acc, typename Fold>
inline Vec<Acc> fold_rows(Vec<Acc>* x, Fold fold) {
#pragma GCC unroll 4
  for (int half = kWidth<Acc> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      x[i] =
          fold(interleave<Acc, false>(x[i], x[i + half]), interleave<Acc, true>(x[i], x[i + half]));
    }
  }
  return x[0];
}

}  // namespace
}  // namespace snoopi
