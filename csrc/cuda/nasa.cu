// The library's face: C functions that take plain structs, so that any caller can bind them.
#include "nasa_launch.h"

#define NASA_EXPORT extern "C" __attribute__((visibility("default")))

// Enqueues one call on `stream` (a cudaStream_t) of the current device. Returns a NasaError.
NASA_EXPORT int snoopi_nasa_cuda(const snoopi::NasaParams* params, int dtype, int head_dim,
                                 void* stream) {
  return snoopi::nasa_launch(*params, dtype, head_dim, stream);
}

// Whether the call, which has no w_out yet, should get one of c_out rows on the current device, or
// leave the projection to a product after it. An estimate; both give the right result.
NASA_EXPORT int snoopi_nasa_cuda_projects(const snoopi::NasaParams* params, int dtype, int head_dim,
                                          int c_out) {
  return snoopi::nasa_projects(*params, dtype, head_dim, c_out);
}

// The instance that the call would use with `shared_limit` bytes of shared memory a block; launches
// nothing and needs no device. Returns a NasaError.
NASA_EXPORT int snoopi_nasa_cuda_query(const snoopi::NasaParams* params, int dtype, int head_dim,
                                       int shared_limit, snoopi::NasaInstance* found) {
  return snoopi::nasa_query(*params, dtype, head_dim, shared_limit, found);
}

NASA_EXPORT const char* snoopi_nasa_cuda_error(int error) { return snoopi::nasa_error_text(error); }

// Why this library cannot run on the current device: its driver is too old, or there is no machine
// code for it. Null if it can.
NASA_EXPORT const char* snoopi_nasa_cuda_trouble() { return snoopi::nasa_trouble(); }
