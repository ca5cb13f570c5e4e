// What the glue hands to a kernel for one linear layer. Free of torch, like attention.h.
#pragma once

#include <stdint.h>

namespace snoopi {

// out = norm(x) w^T + added + residual of rows; all [rows c] contiguous, what is null is left out.
// gated: of every 2 * `Kernel::vector` columns the first half is a value and the second its gate;
// value * gelu(gate) leaves, c_out / 2 wide.
struct Linear {
  int64_t rows, c_in, c_out;
  const void* x;
  const void* gain;  // [c_in] and so offset, in the accumulator's type: a LayerNorm; or null
  const void* offset;
  double eps;
  const void* weight;    // [c_out c_in] by `pack_linear`
  const void* added;     // [c_out] in the accumulator's type, or null
  const void* residual;  // as the output, or null; not when gated
  bool gated;
  void* out;
};

// Rows [begin, end), output columns [j_begin, j_end); j_begin is a multiple of `linear_columns`.
struct LinearTask {
  int64_t begin, end, j_begin, j_end;
};

constexpr int64_t kLinearChannels = 32;  // c_in is a multiple of it

}  // namespace snoopi
