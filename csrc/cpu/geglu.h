// What the glue hands to a kernel for the first layer of a GEGLU. Free of torch, like attention.h.
#pragma once

#include <stdint.h>

namespace snoopi {

// value * gelu(gate) of rows norm(x) w^T + added; x and out [rows c] contiguous, what is null is
// left out. Of every 2 * `Kernel::vector` columns the first half is a value and the second its
// gate.
struct GEGLU {
  int64_t rows, c_in, c_out;
  const void* x;
  const void* gain;  // [c_in] and so offset, in the accumulator's type: a LayerNorm; or null
  const void* offset;
  double eps;
  const void* weight;  // [c_out c_in] by `pack_linear`
  const void* added;   // [c_out] in the accumulator's type, or null
  void* out;           // [rows c_out / 2]
};

// Rows [begin, end), output columns [j_begin, j_end); j_begin is a multiple of `linear_columns`.
struct RowsTask {
  int64_t begin, end, j_begin, j_end;
};

constexpr int64_t kRowChannels = 32;  // c_in is a multiple of it

}  // namespace snoopi
