// The table of a kernel's functions, which the glue calls. Free of torch, as its parts are.
#pragma once

#include "attention.h"
#include "conv.h"
#include "linear.h"

namespace snoopi {

// One element type's kernel. Sizes are in bytes; memory it is given is aligned to 64.
struct Kernel {
  int64_t (*text_bytes)(int64_t n, int64_t d);
  // `live` holds the positions of the live keys in ascending order; null: all are.
  void (*pack_text)(const Text&, int64_t b, int64_t h, const int32_t* live, int64_t num_live,
                    void* to);
  // 0: the kernel does no projections, which are faster elsewhere.
  int64_t (*linear_bytes)(int64_t c_out, int64_t c_in);
  // Packs the output columns [begin, end); begin is a multiple of linear_columns.
  void (*pack_linear)(const void* w, int64_t stride, int64_t c_out, int64_t c_in, int64_t begin,
                      int64_t end, void* to);
  int64_t linear_columns;
  int64_t most_rows;  // of a task
  int64_t (*scratch_bytes)(const Attention&);
  void (*run)(const Attention&, const Task&, void* scratch);
  // Most rows of a linear layer's task, and the scratch of one of so many.
  int64_t (*linear_rows)(int64_t c_in);
  int64_t (*linear_scratch)(const Linear&, int64_t rows);
  void (*run_linear)(const Linear&, const LinearTask&, void* scratch);
  int64_t vector;      // elements
  int64_t block_rows;  // of a product: other numbers of rows cost as much as the next multiple
  // Whether there is code for a kind, and the kind for a 3x3 convolution, of a doubled picture if
  // `doubled`. One without code means that PyTorch's is faster.
  bool (*convolves)(ConvKind);
  ConvKind (*conv_kind)(bool doubled, int64_t c_out, int64_t c_in);
  int64_t (*conv_columns)();  // of a panel of weights
  // Most tiles of a convolution's task, and the scratch of one of height x width tiles.
  int64_t (*conv_tiles)(const Conv&);
  int64_t (*conv_bytes)(const Conv&, int64_t height, int64_t width);
  void (*run_conv)(const Conv&, const ConvTask&, void* scratch);
  void (*add_moments)(const Moments&, int64_t begin, int64_t end);
  // Whether the kernel computes what it should on this processor; null: no doubt.
  bool (*works)();
};

struct Kernels {
  Kernel f32, bf16, f64;
};

// One set per processor capability, each compiled from kernel.cpp with its own flags.
extern const Kernels kernels_default;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
// Products of bf16 pairs in hardware; only `bf16` is filled.
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_amx;
#endif

}  // namespace snoopi
