// The primitives of simt.h on a GPU: PTX of sm_80 and later, and the launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace snoopi {
inline namespace SIMT_BACKEND {

extern __shared__ __align__(128) unsigned char simt_shared[];

SIMT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SIMT_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
SIMT_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
SIMT_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }

// x itself, of which the compiler knows nothing. What depends on it is computed where it stands,
// not before the loop around it, where it would hold registers.
SIMT_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

SIMT_DEVICE void block_sync() { __syncthreads(); }
SIMT_DEVICE void warp_sync() { __syncwarp(); }
SIMT_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }

SIMT_DEVICE uint32_t shared_address(int offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(simt_shared)) + offset;
}

template <typename V>
SIMT_DEVICE V load_shared(int offset) {
  return *reinterpret_cast<const V*>(simt_shared + offset);
}
template <typename V>
SIMT_DEVICE void store_shared(int offset, V x) {
  *reinterpret_cast<V*>(simt_shared + offset) = x;
}

// Read-only data, through the texture path.
SIMT_DEVICE float load_global(const float* from) { return __ldg(from); }
SIMT_DEVICE uint8_t load_global(const uint8_t* from) { return __ldg(from); }
template <typename T>
SIMT_DEVICE T load_global(const T* from) {
  static_assert(sizeof(T) == 2, "16-bit floats");
  return {__ldg(reinterpret_cast<const uint16_t*>(from))};
}
template <typename V>
SIMT_DEVICE void store_global(V* to, V x) {
  *to = x;
}

// Copies 16 bytes from global to shared memory in the background, or writes 16 zero bytes if not
// `live`; then `from` is not read.
SIMT_DEVICE void copy_async16(int offset, const void* from, bool live) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(offset)),
               "l"(__cvta_generic_to_global(from)), "r"(live ? 16 : 0)
               : "memory");
}
SIMT_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Until at most kPending of this thread's committed groups are on their way.
template <int kPending>
SIMT_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
SIMT_DEVICE void load_matrices4(uint32_t (&r)[4], int offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(offset))
               : "memory");
}
SIMT_DEVICE void load_matrices4_transposed(uint32_t (&r)[4], int offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(offset))
               : "memory");
}
// Two matrices; the addresses of lanes 16 to 31 are not used.
SIMT_DEVICE void load_matrices2_transposed(uint32_t (&r)[2], int offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(offset))
               : "memory");
}

// c [16 8] += a [16 16] b [16 8], by warp; b0 and b1 are its upper and lower half.
template <typename T>
SIMT_DEVICE void multiply_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
SIMT_DEVICE void multiply_16816<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
SIMT_DEVICE void multiply_16816<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x and log2(x) by the special function unit: about two units in the last place, subnormals are
// 0.
SIMT_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SIMT_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x, off by at most a unit in the last place; a division would be a call.
SIMT_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to T, the first in the low half.
template <typename T>
SIMT_DEVICE uint32_t pack2(float low, float high);
template <>
SIMT_DEVICE uint32_t pack2<Half>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
SIMT_DEVICE uint32_t pack2<BFloat16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
SIMT_DEVICE float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
SIMT_DEVICE float widen(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

template <typename Kernel, typename Params>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    kernel_entry(const Params params) {
  Kernel::run(params);
}

inline const char* device_error_name(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Of the current device; minus the CUDA error if there is none.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  return error == cudaSuccess ? value : -static_cast<int>(error);
}
// Shared memory that a block may have.
inline int shared_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline int device_processors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
// 10 * major + minor.
inline int device_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// 0, or the CUDA error that keeps a kernel from the current device: no machine code for it, a
// driver older than the runtime.
template <typename Kernel, typename Params>
int kernel_trouble() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel_entry<Kernel, Params>);
}

// 0, or the CUDA error of the launch. Neither waits nor allocates, so it may be captured in a
// graph. Not by <<<>>>, whose error is CUDA's last one: maybe that of a call long before.
template <typename Kernel, typename Params>
int launch(Grid grid, int shared_bytes, void* stream, const Params& params) {
  void (*entry)(Params) = kernel_entry<Kernel, Params>;
  if (shared_bytes > 48 * 1024) {  // more has to be asked for
    const cudaError_t error =
        cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(entry, dim3(grid.x, grid.y, grid.z), dim3(Kernel::kThreads), arguments,
                          shared_bytes, static_cast<cudaStream_t>(stream));
}

}  // namespace SIMT_BACKEND
}  // namespace snoopi
