// The AMX instructions of amx.h in plain code, for tests on processors that have none.
//
// One thread's tiles are arrays; a use of tiles that are not configured stops the program, because
// on a processor it would, too. Products follow TDPBF16PS: pair by pair, the even element first,
// denormal inputs and results as zero.
#pragma once

#include <stdint.h>

namespace snoopi {
namespace {
namespace emulated {

struct State {
  bool configured = false;
  unsigned char tiles[8][16][64];
};

inline State& state() {
  static thread_local State here;
  return here;
}

inline unsigned char (*tile(int i))[64] {
  if (!state().configured) __builtin_trap();
  return state().tiles[i];
}

inline void configure() {
  state().configured = true;
  for (int i = 0; i < 8; ++i) __builtin_memset(tile(i), 0, 16 * 64);
}

inline void release() { state().configured = false; }

inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? 0.0f * x : x; }

inline float from_bf16(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return flushed(x);
}

inline void zero(int i) { __builtin_memset(tile(i), 0, 16 * 64); }

inline void load(int i, const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r) {
    __builtin_memcpy(tile(i)[r], static_cast<const char*>(from) + r * stride, 64);
  }
}

inline void store(int i, void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) {
    __builtin_memcpy(static_cast<char*>(to) + r * stride, tile(i)[r], 64);
  }
}

inline void dot(int sum, int rows, int columns) {
  for (int r = 0; r < 16; ++r) {
    for (int k = 0; k < 16; ++k) {
      uint32_t a;
      __builtin_memcpy(&a, tile(rows)[r] + 4 * k, sizeof(a));
      for (int j = 0; j < 16; ++j) {
        uint32_t b;
        float x;
        __builtin_memcpy(&b, tile(columns)[k] + 4 * j, sizeof(b));
        __builtin_memcpy(&x, tile(sum)[r] + 4 * j, sizeof(x));
        x = flushed(__builtin_fmaf(from_bf16(a << 16), from_bf16(b << 16), x));
        x = flushed(__builtin_fmaf(from_bf16(a & 0xffff0000u), from_bf16(b & 0xffff0000u), x));
        __builtin_memcpy(tile(sum)[r] + 4 * j, &x, sizeof(x));
      }
    }
  }
}

}  // namespace emulated
}  // namespace
}  // namespace snoopi

#define SNOOPI_TILE_ZERO(i) emulated::zero(i)
#define SNOOPI_TILE_LOAD(i, from, stride) emulated::load(i, from, stride)
#define SNOOPI_TILE_DOT(sum, rows, columns) emulated::dot(sum, rows, columns)
#define SNOOPI_TILE_STORE(i, to, stride) emulated::store(i, to, stride)
