// The 16-bit kernel: NASA cross-attention (SNOOPI Eq. 8-10) of a tile of query rows.
//
// Without a projection a block serves one head; with it, all heads of its rows one after the other,
// then out = z w_out^T + b_out while z is still in shared memory.
#pragma once

#include "nasa_attend.h"
#include "nasa_project.h"

namespace snoopi {
inline namespace SIMT_BACKEND {

template <typename S>
struct NasaKernel {
  static constexpr int kThreads = S::kThreads, kMinBlocks = S::kMinBlocks;

  static Grid grid(const NasaParams& p) {
    const unsigned tiles = static_cast<unsigned>((p.m + S::kRows - 1) / S::kRows);
    const unsigned b = static_cast<unsigned>(p.b), h = static_cast<unsigned>(p.h);
    return S::kProject ? Grid{tiles, b, 1} : Grid{tiles, h, b};
  }
  static int shared_bytes(const NasaParams& p) { return S::shared_bytes(static_cast<int>(p.h)); }

  SIMT_DEVICE static void run(const NasaParams& p) {
    const Place at = Place::here();
    const int first = block_x() * S::kRows;
    const int count = smaller(S::kRows, static_cast<int>(p.m) - first);
    float z[S::kValueTiles][4];
    if constexpr (!S::kProject) {
      const Tile tile = {block_z(), block_y(), first, count};
      attend<S>(p, tile, at, z);
      if (!p.twin) store_rows<S>(p, tile, p.out[0], z, at);
    } else {
      Tile tile = {block_y(), 0, first, count};
      const int depth = static_cast<int>(p.h) * S::D, row_size = projected_row(depth);
      clear_padding<S>(depth, at);
      for (; tile.head < p.h; ++tile.head) {
        attend<S>(p, tile, at, z);
        const int row = kWarpRows * opaque(at.warp);
        put_rows<S>(z, S::kProjectedAt + row * row_size + tile.head * S::D * 2, row_size, at);
        block_sync();  // the next head's queries, or w_out, take the place of this one's tiles
      }
      project<S>(p, tile, at);
    }
  }
};

}  // namespace SIMT_BACKEND
}  // namespace snoopi
