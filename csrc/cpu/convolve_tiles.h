// Convolutions of bf16 on AMX tiles without a transformation: nine products of shifted pixels.
//
// Tiles multiply faster than the second cache feeds them, so both operands should come from the
// first. A task's input lies in a patch by chunks of channels; of a patch of pixels that are
// numbered through, border included, any 16 in a row are a tile, and so are those that a filter's
// tap shifts them to. Chunk by chunk, 16 output columns at a time: the chunk's weights of those
// columns and its pixels are in the first cache, sums wait in the second for the next chunk. Four
// tiles of pixels share a tile of weights.
#pragma once

#include "convolve.h"

namespace snoopi {
namespace {

constexpr int kGroupTiles = 4;

// Vectors of columns whose sums are kept at a time, all about as many: thousands of columns would
// push each other's sums out of the second cache.
inline int64_t column_tiles(int64_t columns) {
  constexpr int64_t kMost = 20;
  const int64_t all = (columns + kTileUnits - 1) / kTileUnits, parts = (all + kMost - 1) / kMost;
  return (all + parts - 1) / parts;
}

// Pixels of a task of height x width pixels: where in the patch each tile of 16 begins.
struct Pixels {
  int64_t columns;  // of the patch
  int64_t count;    // of the patch, and what the last tile reads past it
  int64_t tiles;
  bool whole;  // a row of pixels is whole tiles; else tiles run on over the border

  Pixels(int64_t height, int64_t width) : columns(width + 2), whole(width % kTileRows == 0) {
    const int64_t pixels = whole ? height * width : height * columns - 2;
    tiles = (pixels + kTileRows - 1) / kTileRows;
    count = (height + 2) * columns + kTileRows;
  }
  int64_t begin(int64_t tile, int64_t width) const {
    if (!whole) return tile * kTileRows;
    const int64_t row = width / kTileRows;
    return tile / row * columns + tile % row * kTileRows;
  }
};

struct TileScratch {
  BFloat16* patch;  // [chunks, pixels, chunk]
  float* sums;      // [tiles, columns of a task / 16, 16, 16]
};

inline int64_t lay_out(const Conv& call, const Pixels& pixels, char* memory, TileScratch* scratch) {
  const int64_t patch = round_up(pixels.count * call.c_in * 2, 64);
  const int64_t vectors = column_tiles(call.c_out);
  scratch->patch = reinterpret_cast<BFloat16*>(memory);
  scratch->sums = reinterpret_cast<float*>(memory + patch);
  return patch + pixels.tiles * vectors * kTileRows * kTileUnits * 4;
}

// 64 pixels by 16 columns, or fewer pixels: sums += pixels * weights over a chunk's taps. Beside
// every tile of weights `lines` lines are fetched from `ahead` on: processors do not foresee that
// the next columns' weights come from elsewhere.
template <int kTiles>
inline void multiply_taps(const BFloat16* const* pixels, int64_t chunk, const int64_t* shifts,
                          int64_t taps, const uint32_t* weights, float* sums, int64_t stride,
                          bool first, const char* ahead, int64_t lines) {
  const int64_t pixel = chunk * 2;  // bytes
  barrier();
  if (first) {
    SNOOPI_TILE_ZERO(0);
    if constexpr (kTiles > 1) SNOOPI_TILE_ZERO(1);
    if constexpr (kTiles > 2) SNOOPI_TILE_ZERO(2);
    if constexpr (kTiles > 3) SNOOPI_TILE_ZERO(3);
  } else {
    SNOOPI_TILE_LOAD(0, sums, 64);
    if constexpr (kTiles > 1) SNOOPI_TILE_LOAD(1, sums + stride, 64);
    if constexpr (kTiles > 2) SNOOPI_TILE_LOAD(2, sums + 2 * stride, 64);
    if constexpr (kTiles > 3) SNOOPI_TILE_LOAD(3, sums + 3 * stride, 64);
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t shift = shifts[tap] * chunk;
    for (int64_t c = 0; c < chunk; c += kConvChannels) {
      for (int64_t i = 0; i < lines; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
      SNOOPI_TILE_LOAD(7, weights, 64);
      SNOOPI_TILE_LOAD(4, pixels[0] + shift + c, pixel);
      SNOOPI_TILE_DOT(0, 4, 7);
      if constexpr (kTiles > 1) {
        SNOOPI_TILE_LOAD(5, pixels[1] + shift + c, pixel);
        SNOOPI_TILE_DOT(1, 5, 7);
      }
      if constexpr (kTiles > 2) {
        SNOOPI_TILE_LOAD(6, pixels[2] + shift + c, pixel);
        SNOOPI_TILE_DOT(2, 6, 7);
      }
      if constexpr (kTiles > 3) {
        SNOOPI_TILE_LOAD(4, pixels[3] + shift + c, pixel);
        SNOOPI_TILE_DOT(3, 4, 7);
      }
      weights += kTileUnits * kTileUnits;
    }
  }
  SNOOPI_TILE_STORE(0, sums, 64);
  if constexpr (kTiles > 1) SNOOPI_TILE_STORE(1, sums + stride, 64);
  if constexpr (kTiles > 2) SNOOPI_TILE_STORE(2, sums + 2 * stride, 64);
  if constexpr (kTiles > 3) SNOOPI_TILE_STORE(3, sums + 3 * stride, 64);
  barrier();
}

// The pixels of all tiles leave, every `times`-th one from (y, x) on.
inline void leave_tiles(const Conv& call, const ConvTask& task, const Pixels& pixels,
                        const float* sums, int64_t times, int64_t y, int64_t x) {
  constexpr int64_t kW = kTileUnits;
  const int64_t height = task.y_end - task.y_begin, width = task.x_end - task.x_begin;
  const int64_t w = call.w * times, columns = task.j_end - task.j_begin;
  const int64_t vectors = (columns + kW - 1) / kW;
  const int64_t batch = task.b * call.h * times * w * call.c_out + task.j_begin;
  BFloat16* out = static_cast<BFloat16*>(call.out) + batch;
  const BFloat16* residual = static_cast<const BFloat16*>(call.residual);
  if (residual != nullptr) residual += batch;
  const float* added = static_cast<const float*>(call.added);
  if (added != nullptr) added += task.b * call.added_stride + task.j_begin;
  for (int64_t t = 0; t < pixels.tiles; ++t) {
    const float* tile = sums + t * vectors * kTileRows * kW;
    int64_t row = pixels.begin(t, width) / pixels.columns;
    int64_t column = pixels.begin(t, width) % pixels.columns;
    for (int64_t r = 0; r < kTileRows; ++r, ++column) {
      if (column == pixels.columns) column = 0, ++row;
      if (row >= height || column >= width) continue;
      const int64_t at =
          (((task.y_begin + row) * times + y) * w + (task.x_begin + column) * times + x) *
          call.c_out;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t j = v * kW, left = columns - j;
        VecF sum = load(tile + (v * kTileRows + r) * kW);
        if (added != nullptr) sum += widen_load<float>(added + j, left);
        if (residual != nullptr) sum += widen_load<float>(residual + at + j, left);
        narrow_store<float>(sum, out + at + j, left);
      }
    }
  }
}

template <typename F>
void run_conv(const Conv& call, const ConvTask& task, void* memory) {
  const Tiles registers;
  const int64_t height = task.y_end - task.y_begin, width = task.x_end - task.x_begin;
  const Pixels pixels(height, width);
  TileScratch scratch = {};
  lay_out(call, pixels, static_cast<char*>(memory), &scratch);
  const int64_t chunk = chunk_of(call.c_in), of_chunk = pixels.count * chunk;
  fill_patch<Paired>(call, task, 0, call.c_in, scratch.patch, chunk, of_chunk);
  const int64_t taps = taps_of(call.kind), depth = depth_of(call.kind, call.c_in);
  const int64_t units = depth_units<Paired>(depth), panel = units * kTileUnits;
  const int64_t matrix = packed_units<Paired>(call.c_out, depth);
  constexpr int64_t kTile = kTileRows * kTileUnits;
  const int64_t most = column_tiles(task.j_end - task.j_begin) * kTileUnits;
  const int64_t groups = (pixels.tiles + kGroupTiles - 1) / kGroupTiles;
  const int64_t lines = (kTileRows + groups - 1) / groups;
  const int times = call.kind == ConvKind::kPhased ? 2 : 1;
  for (int phase = 0; phase < times * times; ++phase) {
    const int y = phase / 2, x = phase % 2;
    int64_t shifts[9];
    for (int tap = 0; tap < taps; ++tap) {
      shifts[tap] = times == 1 ? tap / 3 * pixels.columns + tap % 3
                               : (y + tap / 2) * pixels.columns + x + tap % 2;
    }
    for (int64_t j = task.j_begin; j < task.j_end; j += most) {
      ConvTask part = task;
      part.j_begin = j;
      part.j_end = task.j_end - j < most ? task.j_end : j + most;
      const uint32_t* weights =
          static_cast<const uint32_t*>(call.weight) + phase * matrix + j / kTileUnits * panel;
      const int64_t vectors = (part.j_end - j + kTileUnits - 1) / kTileUnits;
      for (int64_t c = 0; c < call.c_in; c += chunk) {
        const BFloat16* patch = scratch.patch + c / chunk * of_chunk;
        for (int64_t v = 0; v < vectors; ++v) {
          const uint32_t* columns = weights + v * panel + c * taps / 2 * kTileUnits;
          // Each group of tiles fetches its part of the next columns' weights.
          const char* ahead = reinterpret_cast<const char*>(columns + panel);
          for (int64_t t = 0; t < pixels.tiles; t += kGroupTiles) {
            const int64_t left = pixels.tiles - t;
            const BFloat16* from[kGroupTiles];
            for (int64_t i = 0; i < kGroupTiles && i < left; ++i) {
              from[i] = patch + pixels.begin(t + i, width) * chunk;
            }
            const auto run = left == 1   ? multiply_taps<1>
                             : left == 2 ? multiply_taps<2>
                             : left == 3 ? multiply_taps<3>
                                         : multiply_taps<4>;
            run(from, chunk, shifts, taps, columns, scratch.sums + (t * vectors + v) * kTile,
                vectors * kTile, c == 0, ahead, lines);
            ahead += lines * 64 * (chunk / kConvChannels * taps);
          }
        }
      }
      leave_tiles(call, part, pixels, scratch.sums, times, y, x);
    }
  }
}

template <typename F>
int64_t conv_bytes(const Conv& call, int64_t height, int64_t width) {
  // A smaller task at the border may have more tiles, where its rows are not whole tiles.
  int64_t most = 0;
  TileScratch scratch = {};
  for (int64_t w = 1; w <= width; ++w) {
    const int64_t bytes = lay_out(call, Pixels(height, w), nullptr, &scratch);
    if (bytes > most) most = bytes;
  }
  return most;
}

template <typename F>
int64_t conv_columns() {
  return kTileUnits;
}

// Most pixels of a task: the more, the less often weights stream past; but patch and sums are to
// stay in the second cache.
template <typename F>
int64_t conv_tiles(const Conv&) {
  return 256;
}

template <typename F>
bool convolves(ConvKind kind) {
  return kind == ConvKind::kDirect || kind == ConvKind::kPhased;
}

// Tiles multiply faster than vectors transform.
template <typename F>
ConvKind conv_kind(bool doubled, int64_t, int64_t) {
  return doubled ? ConvKind::kPhased : ConvKind::kDirect;
}

}  // namespace
}  // namespace snoopi
