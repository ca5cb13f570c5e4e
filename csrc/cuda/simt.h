// What a kernel may use: the few operations of one thread, warp or block, on a GPU or emulated.
//
// Kernels are written against the functions that both simt_cuda.h (PTX) and simt_emu.h (the same on
// the host, with checks) define; everything else in them is plain C++. Shared memory is addressed
// by byte offsets into the block's one dynamic allocation, never by pointers.
#pragma once

#include <stdint.h>

namespace snoopi {

// 16-bit floats as their bits: no arithmetic is done on them but by the primitives.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

struct alignas(8) Float2 {
  float x, y;
};
struct alignas(16) Float4 {
  float x[4];
};
struct alignas(16) Bytes16 {
  uint32_t x[4];
};

struct Grid {
  unsigned x, y, z;
};

}  // namespace snoopi

// One binary must not hold both backends' versions of the same templates under one name, hence the
// inline namespace.
#if defined(__CUDACC__)  // not __CUDA_ARCH__: nvcc's host pass must see the same declarations
#define SIMT_BACKEND compiled
#define SIMT_HD __host__ __device__
#define SIMT_DEVICE __device__ __forceinline__
#define SIMT_UNROLL _Pragma("unroll")
#define SIMT_UNROLL_BY(times) _Pragma(SIMT_TEXT(unroll times))
#define SIMT_TEXT(x) #x
#include "simt_cuda.h"
#else
#define SIMT_BACKEND emulated
#define SIMT_HD
#define SIMT_DEVICE inline
#define SIMT_UNROLL
#define SIMT_UNROLL_BY(times)
#include "../simt/simt_emu.h"
#endif
