// 16-bit floats on the host, as a GPU converts them: to nearest, ties to even.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../cuda/simt.h"

namespace snoopi {
namespace emulation {

inline uint32_t bits_of(float x) {
  uint32_t y;
  memcpy(&y, &x, sizeof(y));
  return y;
}
inline float float_of(uint32_t x) {
  float y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

inline float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float widen(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  // The exponent's bias differs by 112; the product is exact and makes subnormals normal.
  uint32_t y = bits_of(float_of(magnitude << 13) * 0x1p112f);
  if (magnitude >= 0x7c00u) y |= 0x7f800000u;
  return float_of(y | (x.bits & 0x8000u) << 16);
}

template <typename T>
T narrow(float x);

template <>
inline BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline Half narrow<Half>(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u;
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  if (x != x) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and up
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 aligns to steps of 2^-24 and rounds
    const uint32_t steps = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    return {static_cast<uint16_t>(sign | steps)};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13)};
}

}  // namespace emulation
}  // namespace snoopi
