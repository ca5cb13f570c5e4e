// What the glue hands to a kernel for one convolution. Free of torch, like attention.h.
#pragma once

#include <stdint.h>

namespace snoopi {

// How a convolution of stride 1, padded with zeros to keep its size, becomes products of matrices.
enum class ConvKind {
  kDirect,    // 3x3: rows are pixels, nine times as deep
  kWinograd,  // 3x3 by F(2x2, 3x3) of Lavin & Gray (2016): 16 products for four pixels, not 36
  kDoubled,   // the same of a picture doubled by nearest neighbour: 7 of the 16 are 0
  kPhased,    // of a doubled picture, too: a 2x2 filter for each of the four pixels of a pixel
};

namespace {  // a copy for every object: each is compiled for another processor

// Products of a tile of output pixels.
inline int positions_of(ConvKind kind) {
  switch (kind) {
    case ConvKind::kWinograd:
      return 16;
    case ConvKind::kDoubled:
      return 9;
    case ConvKind::kPhased:
      return 4;
    default:
      return 1;
  }
}
inline int64_t taps_of(ConvKind kind) {
  return kind == ConvKind::kDirect ? 9 : kind == ConvKind::kPhased ? 4 : 1;
}
inline int64_t depth_of(ConvKind kind, int64_t c_in) { return taps_of(kind) * c_in; }
inline bool doubles(ConvKind kind) {
  return kind == ConvKind::kDoubled || kind == ConvKind::kPhased;
}

constexpr int64_t kConvChannels = 32;  // c_in is a multiple of it

// The depth of a product with taps is by chunks of channels, in a chunk by taps, in a tap by
// channels.
inline int64_t chunk_of(int64_t c_in) {
  return c_in % (2 * kConvChannels) == 0 ? 2 * kConvChannels : kConvChannels;
}

}  // namespace

// out = conv(act(scale x + shift)) + added + residual. All pictures are [b h w c] contiguous; what
// is null is left out.
struct Conv {
  ConvKind kind;
  int64_t b, h, w, c_in, c_out;  // of the input; 2h x 2w leave where it doubles
  const void* x;
  const void* scale;  // [b|1 c_in] and so shift, in the accumulator's type: a norm
  const void* shift;
  int64_t norm_stride;  // 0: one serves the whole batch
  bool silu;
  const void* weight;    // positions, in each panels of [`conv_columns` depth] by `pack_linear`
  const void* added;     // [b|1 c_out] in the accumulator's type: bias, time embedding
  int64_t added_stride;  // 0: one serves the whole batch
  const void* residual;  // as the output
  void* out;
};

// Tiles [y_begin, y_end) x [x_begin, x_end) of one picture, output columns [j_begin, j_end).
struct ConvTask {
  int64_t b, y_begin, y_end, x_begin, x_end, j_begin, j_end;
};

// Sums of a picture's pixels [begin, end) by channel, around `about` [c]: sums of x - about and of
// its squares, both in the accumulator's type.
struct Moments {
  const void* x;  // [pixels c]
  int64_t c;
  const void* about;
  void* sum;
  void* squares;
};

}  // namespace snoopi
