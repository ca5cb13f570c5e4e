// Compile-time sizes of an instance of the 16-bit kernel, and what it keeps in shared memory.
#pragma once

#include "nasa_params.h"
#include "simt.h"

// A fault planted on purpose, to prove that the tests would find it; 0: none.
#ifndef NASA_FAULT
#define NASA_FAULT 0
#endif

namespace snoopi {
inline namespace SIMT_BACKEND {

SIMT_HD constexpr bool fault(int number) { return NASA_FAULT == number; }

SIMT_HD constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }
SIMT_HD constexpr int larger(int a, int b) { return a > b ? a : b; }
SIMT_HD constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Bytes of a row of `columns` 16-bit elements in shared memory: an odd number of 16-byte units, so
// that eight rows below each other lie in different banks.
SIMT_HD constexpr int row_bytes(int columns) {
  return fault(10) ? columns * 2 : (columns / 8 | 1) * 16;
}

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr int kWarpRows = 16;  // query rows of a warp: the height of a product

// T: Half or BFloat16. D: head dim. KT: keys of a tile. kStages_: tiles on their way at once.
// kSingle_: each text fits one tile, so its sum is known before its values are needed. kProject_:
// the kernel applies w_out itself.
//
// Shared memory: [queries | stages of (keys, values, limits) | z of all heads, if projecting]. The
// queries' rows serve their own warp as a buffer for results, the stages take tiles of w_out.
template <typename T_, int D_, int KT_, int kWarps_, int kStages_, bool kSingle_, bool kProject_>
struct Shape {
  typedef T_ T;
  static constexpr int D = D_, KT = KT_, kWarps = kWarps_, kStages = kStages_;
  static constexpr bool kSingle = kSingle_, kProject = kProject_;
  static_assert(D % 8 == 0 && KT % 16 == 0, "whole matrices of 8 x 8");

  static constexpr bool kNarrow = D <= 80;
  static constexpr int kThreads = 32 * kWarps;
  // Of a multiprocessor: 16 warps of 128 registers, where that is enough without spilling.
  static constexpr int kMinBlocks = D == 40 && !kProject ? 16 / kWarps : 1;
  // The queries of every tile anew, where keeping them would spill.
  static constexpr bool kReload = kProject && !kSingle && !kNarrow;
  static constexpr int kRows = kWarpRows * kWarps;
  static constexpr int kDepth = round_up(D, 16);  // of q k^T, whole products
  static constexpr int kSteps = kDepth / 16;      // products along it
  static constexpr int kKeyTiles = KT / 8;        // columns of the logits
  static constexpr int kValueTiles = D / 8;       // columns of z

  static constexpr int kQueryRow = row_bytes(kDepth);
  static constexpr int kKeyRow = row_bytes(kDepth);
  static constexpr int kValueRow = row_bytes(D);
  static constexpr int kQueryBytes = kRows * kQueryRow;
  static constexpr int kValuesAt = KT * kKeyRow;  // within a stage
  static constexpr int kLimitsAt = kValuesAt + KT * kValueRow;
  static constexpr int kStageBytes = kLimitsAt + KT * 4;
  static constexpr int kProjectedAt = kQueryBytes + kStages * kStageBytes;

  // Tiles of w_out: kColumns of its rows (output channels), kRun of its columns.
  static constexpr int kColumns = 64, kRun = 64;
  static constexpr int kWeightRow = row_bytes(kRun);
  static constexpr int kWeightBytes = kColumns * kWeightRow;
  static constexpr int kWeightStages = 2;
  static constexpr int kMinStages = kProject ? kWeightStages * kWeightBytes : 0;
  static_assert(kStages * kStageBytes >= kMinStages,
                "tiles of w_out fit where those of texts were");

  static int shared_bytes(int h) {
    return kProjectedAt + (kProject ? kRows * row_bytes(round_up(h * D, 16)) : 0);
  }
};

// What a thread needs to know of its place.
struct Place {
  int thread, warp, lane;
  int group, pair;  // lane / 4, lane % 4: its row and pair of columns in a product's result
  SIMT_DEVICE static Place here() { return of(thread_index()); }
  SIMT_DEVICE static Place of(int thread) {
    const int lane = thread % 32;
    return {thread, thread / 32, lane, lane / 4, lane % 4};
  }
  // For what is done rarely in a loop: see `opaque`.
  SIMT_DEVICE Place again() const { return of(opaque(thread)); }
};

// The rows [first, first + count) of one batch item and head that a block attends for.
struct Tile {
  int batch, head, first, count;
  // The index of a row among all of [b m].
  SIMT_DEVICE int64_t row_of_all(const NasaParams& p, int row) const {
    return p.m * static_cast<int64_t>(opaque(batch)) + opaque(first) + row;
  }
};

}  // namespace SIMT_BACKEND
}  // namespace snoopi
