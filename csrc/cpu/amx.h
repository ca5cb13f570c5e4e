// Products of bf16 pairs on AMX tiles: 32 rows by 32 columns at a time, a step 32 deep.
//
// Eight tiles: four sums, two of rows, two of columns. Every tile is 16 rows of 64 bytes: 16 rows
// of 32 bf16 (rows), 16 pairs deep by 16 columns (columns), 16 by 16 fp32 (sums).
//
// SNOOPI_AMX_EMULATED replaces the eight instructions by plain code with the same meaning, so that
// everything but they themselves runs and is tested on any processor.
#pragma once

#include <stdint.h>

#if defined(SNOOPI_AMX_EMULATED)
#include "amx_emulated.h"
#else
#include <immintrin.h>
#define SNOOPI_TILE_ZERO(tile) _tile_zero(tile)
#define SNOOPI_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define SNOOPI_TILE_DOT(sum, rows, columns) _tile_dpbf16ps(sum, rows, columns)
#define SNOOPI_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#endif

namespace snoopi {
namespace {

// The shapes of the tiles, which hold for the thread until they are released. Left in place they
// would cost every switch of threads 8 KiB, and they would be another library's surprise.
struct Tiles {
#if defined(SNOOPI_AMX_EMULATED)
  Tiles() { emulated::configure(); }
  ~Tiles() { emulated::release(); }
#else
  Tiles() {
    // Not on the stack: compilers take it that the instruction reads 8 of its 64 bytes.
    alignas(64) static constexpr struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } kConfig;
    static_assert(sizeof(kConfig) == 64);
    _tile_loadconfig(&kConfig);
  }
  ~Tiles() { _tile_release(); }
#endif
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileUnits = 16;  // of 4 bytes, in a tile's row

// Compilers do not know what memory the loads and stores of tiles touch.
inline void barrier() { asm volatile("" ::: "memory"); }

// Up to 32 rows (kTall: more than 16) and 32 columns (kWide: more than 16). `steps` is rounded up
// to whole tiles. c += if `add`, else c =.
template <bool kTall, bool kWide>
inline void multiply_tile_block(const uint32_t* a, int64_t a_stride, const uint32_t* b,
                                int64_t steps, float* c, int64_t c_stride, bool add) {
  constexpr int64_t kColumns = kWide ? 32 : 16;
  float* low = c + kTileRows * c_stride;
  const int64_t c_bytes = c_stride * 4;
  barrier();
  if (add) {
    SNOOPI_TILE_LOAD(0, c, c_bytes);
    if constexpr (kWide) SNOOPI_TILE_LOAD(1, c + kTileUnits, c_bytes);
    if constexpr (kTall) SNOOPI_TILE_LOAD(2, low, c_bytes);
    if constexpr (kTall && kWide) SNOOPI_TILE_LOAD(3, low + kTileUnits, c_bytes);
  } else {
    SNOOPI_TILE_ZERO(0);
    if constexpr (kWide) SNOOPI_TILE_ZERO(1);
    if constexpr (kTall) SNOOPI_TILE_ZERO(2);
    if constexpr (kTall && kWide) SNOOPI_TILE_ZERO(3);
  }
  for (int64_t k = 0; k < steps; k += kTileUnits) {
    SNOOPI_TILE_LOAD(6, b + k * kColumns, kColumns * 4);
    SNOOPI_TILE_LOAD(4, a + k, a_stride * 4);
    SNOOPI_TILE_DOT(0, 4, 6);
    if constexpr (kWide) {
      SNOOPI_TILE_LOAD(7, b + k * kColumns + kTileUnits, kColumns * 4);
      SNOOPI_TILE_DOT(1, 4, 7);
    }
    if constexpr (kTall) {
      SNOOPI_TILE_LOAD(5, a + kTileRows * a_stride + k, a_stride * 4);
      SNOOPI_TILE_DOT(2, 5, 6);
    }
    if constexpr (kTall && kWide) SNOOPI_TILE_DOT(3, 5, 7);
  }
  SNOOPI_TILE_STORE(0, c, c_bytes);
  if constexpr (kWide) SNOOPI_TILE_STORE(1, c + kTileUnits, c_bytes);
  if constexpr (kTall) SNOOPI_TILE_STORE(2, low, c_bytes);
  if constexpr (kTall && kWide) SNOOPI_TILE_STORE(3, low + kTileUnits, c_bytes);
  barrier();
}

// See `multiply` in gemm.h.
inline void multiply_tiles(const uint32_t* a, int64_t a_stride, int64_t rows, const uint32_t* b,
                           int64_t depth, int64_t begin, int64_t steps, int64_t vectors, float* c,
                           int64_t c_stride, bool add) {
  const bool tall = rows > kTileRows;
  for (int64_t v = 0; v < vectors; v += 2) {
    const bool wide = v + 1 < vectors;
    const uint32_t* panel = b + v * kTileUnits * depth + begin * kTileUnits * (wide ? 2 : 1);
    const auto block =
        tall ? (wide ? multiply_tile_block<true, true> : multiply_tile_block<true, false>)
             : (wide ? multiply_tile_block<false, true> : multiply_tile_block<false, false>);
    block(a, a_stride, panel, steps, c + v * kTileUnits, c_stride, add);
  }
}

}  // namespace
}  // namespace snoopi
