// Element types: how a tensor's elements become the units that the products in gemm.h multiply.
#pragma once

#include "vec.h"

namespace snoopi {
namespace {

struct BFloat16 {
  uint16_t bits;
};

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof(y));
  return y;
}

inline VecF widen_load(const float* from) { return load(from); }
inline VecD widen_load(const double* from) { return load(from); }
inline VecF widen_load(const BFloat16* from) {
  typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
  VecU16 x;
  __builtin_memcpy(&x, from, sizeof(x));
  return (VecF)(__builtin_convertvector(x, VecU32) << 16);
}

// One vector, rounded to T where that is narrower.
inline void narrow_store(VecF x, float* to) { store(to, x); }
inline void narrow_store(VecD x, double* to) { store(to, x); }
inline void narrow_store(VecF x, BFloat16* to) {  // round to nearest even; NaN stays NaN
#if defined(__AVX512BF16__)
  const __m256bh y = _mm512_cvtneps_pbh((__m512)x);
  __builtin_memcpy(to, &y, sizeof(y));
#else
  typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));
  const VecU32 bits = (VecU32)x;
  VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = x != x ? VecU32{} + 0x7fc0u : rounded;
  const VecU16 y = __builtin_convertvector(rounded, VecU16);
  __builtin_memcpy(to, &y, sizeof(y));
#endif
}

// The first `count` lanes of a vector.
template <typename Acc, typename T>
inline void narrow_store(Vec<Acc> x, T* to, int64_t count) {
  if (count >= kWidth<Acc>) return narrow_store(x, to);
  T lanes[kWidth<Acc>];
  narrow_store(x, lanes);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
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

// T: the tensors' elements. Unit: what the products take at a step of depth, `kPerUnit` of
// `Element`. Acc: what is summed in. kExactExp: see exp2_nonpositive.
template <typename Real>
struct Plain {
  typedef Real T;
  typedef Real Element;
  typedef Real Unit;
  typedef Real Acc;
  static constexpr int kPerUnit = 1;
  static constexpr bool kExactExp = true;
};

// bf16 tensors computed in fp32.
struct Widened {
  typedef BFloat16 T;
  typedef float Element;
  typedef float Unit;
  typedef float Acc;
  static constexpr int kPerUnit = 1;
  static constexpr bool kExactExp = false;
};

// bf16 tensors whose products are of bf16 pairs, summed in fp32.
struct Paired {
  typedef BFloat16 T;
  typedef BFloat16 Element;
  typedef uint32_t Unit;
  typedef float Acc;
  static constexpr int kPerUnit = 2;
  static constexpr bool kExactExp = false;
};

// Units that hold a depth of `x` elements. Paired rows are padded to an AMX tile's depth.
template <typename F>
inline int64_t depth_units(int64_t x) {
  return F::kPerUnit == 1 ? x : round_up(x, 32) / 2;
}

// `count` elements of a row that begins at `from`, as `units` units; those past the last are zero.
// Pairs come in whole chunks of 32 elements.
template <typename F>
inline void fill_units(const typename F::T* from, int64_t count, typename F::Unit* to,
                       int64_t units) {
  if constexpr (F::kPerUnit == 1) {
    const int64_t filled = count < units ? count : units;
    for (int64_t i = 0; i < filled; ++i) to[i] = widen(from[i]);
    for (int64_t i = filled; i < units; ++i) to[i] = 0;
  } else {
    const int64_t room = units * F::kPerUnit;
    const int64_t filled = count < room ? count : room;
    typename F::Element* elements = reinterpret_cast<typename F::Element*>(to);
    // In pieces of fixed sizes, because a memcpy of a size known only now is a call.
    constexpr int64_t kChunk = 32, kPiece = 8;
    for (int64_t i = filled / kChunk * kChunk; i < room; i += kChunk) {
      __builtin_memset(elements + i, 0, kChunk * sizeof(typename F::Element));
    }
    int64_t i = 0;
    for (; i + kChunk <= filled; i += kChunk) {
      __builtin_memcpy(elements + i, from + i, kChunk * sizeof(typename F::Element));
    }
    for (; i + kPiece <= filled; i += kPiece) {
      __builtin_memcpy(elements + i, from + i, kPiece * sizeof(typename F::Element));
    }
    for (; i < filled; ++i) elements[i] = from[i];
  }
}

}  // namespace
}  // namespace snoopi
