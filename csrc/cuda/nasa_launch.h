// From a call's sizes to an instance of a kernel. Whatever cannot run is refused by name before
// anything is launched.
#pragma once

#include <type_traits>

#include "nasa_kernel.h"
#include "nasa_plain.h"

// A single head dim to compile, for tests that need few instances; 0: all.
#ifndef NASA_ONLY_DIM
#define NASA_ONLY_DIM 0
#endif

namespace snoopi {
inline namespace SIMT_BACKEND {

constexpr int kSingleTile = 80;                    // 77 tokens of CLIP
constexpr int kManyTile = 64, kManyTileWide = 48;  // less for 160 wide heads: registers
constexpr int64_t kManyRows = 1024;  // more queries than this: blocks of twice the rows
// No more than these with a projection: blocks of half the rows, which all run at once on a device
// of 160 multiprocessors.
constexpr int kFewRowsOfBlock = 32;
constexpr int64_t kFewRows = 160 * kFewRowsOfBlock;
inline bool few_rows(const NasaParams& p) { return p.b * p.m <= kFewRows; }

SIMT_HD constexpr bool compiled_dim(int d) { return NASA_ONLY_DIM == 0 || NASA_ONLY_DIM == d; }

inline bool multiple_of_16_bytes(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// The strides of (batch, token, head), in elements, for copies of 16 bytes and 32-bit offsets
// within a head's rows.
inline int check_strides(const void* pointer, const int64_t (&stride)[3], int64_t rows,
                         int element) {
  if (!multiple_of_16_bytes(pointer)) return kMisaligned;
  for (const int64_t s : stride) {
    if (s * element % 16 != 0) return kMisaligned;
  }
  return stride[1] < 0 || stride[1] * rows > INT32_MAX ? kTooLarge : kOk;
}

inline int check_call(const NasaParams& p, int dtype, int d) {
  if (dtype != kHalf && dtype != kBFloat16 && dtype != kFloat) return kBadDType;
  if ((d != 40 && d != 64 && d != 72 && d != 80 && d != 160) || !compiled_dim(d))
    return kBadHeadDim;
  if (p.num_texts < 1 || p.num_texts > kMaxTexts || (p.twin && p.num_texts != 2)) return kBadTexts;
  if (!(p.softmax_scale > 0.0f)) return kBadScale;
  if (p.b < 1 || p.m < 1 || p.h < 1 || p.b > 65535 || p.h > 65535 || p.m > (1 << 24)) {
    return kTooLarge;
  }
  const int element = dtype == kFloat ? 4 : 2;
  int error = check_strides(p.q, p.q_stride, p.m, element);
  for (int i = 0; i < p.num_texts && error == kOk; ++i) {
    const NasaText& text = p.texts[i];
    if (text.n < 1 || text.n > kMaxTextLength) return kBadTexts;
    error = check_strides(text.k, text.k_stride, text.n, element);
    if (error == kOk) error = check_strides(text.v, text.v_stride, text.n, element);
  }
  if (error != kOk) return error;
  for (int i = 0; i < (p.twin ? 2 : 1); ++i) {
    if (!multiple_of_16_bytes(p.out[i])) return kMisaligned;
  }
  if (p.w_out == nullptr) return kOk;
  if (dtype == kFloat || p.twin || p.h * d > kMaxProjected) return kBadProjection;
  if (p.c_out < 1 || p.c_out > (1 << 20)) return kTooLarge;
  return multiple_of_16_bytes(p.w_out) ? kOk : kMisaligned;
}

inline bool one_tile_each(const NasaParams& p) {
  for (int i = 0; i < p.num_texts; ++i) {
    if (p.texts[i].n > kSingleTile) return false;
  }
  return true;
}

// Whether the kernel itself should project rather than leave that to a product after it: by an
// estimate (docs/cuda.md), not a measurement. A block that projects walks all heads, so there are
// few of them: they must be small, fill the device, and all run at once. Then they save the launch
// of the product and z's way through memory, which on Hopper is as much as what they lose.
inline bool projects_well(const NasaParams& p, int dtype, int d, int c_out, int processors,
                          int capability) {
  if (capability < 90 || dtype == kFloat || p.twin || p.h < 1 || !one_tile_each(p)) return false;
  if (d != 40 || p.h * d > 320 || c_out > 320 || !few_rows(p)) return false;
  const int64_t blocks = p.b * ((p.m + kFewRowsOfBlock - 1) / kFewRowsOfBlock);
  return blocks <= processors && 4 * blocks >= 3 * processors;
}

// Calls visit.template instance<Kernel, S>() of the kernels that could serve the call, best first,
// until one returns something else than kNoSharedMemory.
template <typename T, int D, bool kSingle, typename Visit>
int visit_shapes(const NasaParams& p, const Visit& visit) {
  constexpr int kMany = D == 160 ? kManyTileWide : kManyTile;
  constexpr int KT = kSingle ? kSingleTile : kMany;
  if (p.w_out != nullptr) {
    if constexpr (D == 40 && kSingle) {
      typedef Shape<T, D, KT, kFewRowsOfBlock / kWarpRows, 2, kSingle, true> Few;
      if (few_rows(p)) return visit.template instance<NasaKernel<Few>, Few>();
    }
    // 160 wide heads: fewer rows, or A100's shared memory is too small; and fewer keys.
    typedef Shape<T, D, D == 160 && !kSingle ? 32 : KT, D == 160 ? 2 : 4, 2, kSingle, true> S;
    return visit.template instance<NasaKernel<S>, S>();
  }
  if constexpr (D == 160) {
    typedef Shape<T, D, KT, 4, 2, kSingle, false> Large;
    const int error = visit.template instance<NasaKernel<Large>, Large>();
    if constexpr (kSingle) {  // devices with 99 KiB (sm_86, sm_89) have no room for two stages
      typedef Shape<T, D, KT, 2, 1, kSingle, false> Small;
      if (error == kNoSharedMemory) return visit.template instance<NasaKernel<Small>, Small>();
    }
    return error;
  } else {
    typedef Shape<T, D, KT, 8, 2, kSingle, false> Large;  // halves what is read of the texts
    typedef Shape<T, D, KT, 4, 2, kSingle, false> Small;  // twice the blocks
    int error = kNoSharedMemory;
    if (p.m > kManyRows) error = visit.template instance<NasaKernel<Large>, Large>();
    return error != kNoSharedMemory ? error : visit.template instance<NasaKernel<Small>, Small>();
  }
}

template <int D, typename Visit>
int visit_dtypes(const NasaParams& p, int dtype, const Visit& visit) {
  if constexpr (!compiled_dim(D)) {
    return kBadHeadDim;
  } else if (dtype == kFloat) {
    return visit.template instance<PlainKernel<D>, PlainShape<D>>();
  } else if (dtype == kHalf) {
    return one_tile_each(p) ? visit_shapes<Half, D, true>(p, visit)
                            : visit_shapes<Half, D, false>(p, visit);
  } else {
    return one_tile_each(p) ? visit_shapes<BFloat16, D, true>(p, visit)
                            : visit_shapes<BFloat16, D, false>(p, visit);
  }
}

template <typename Visit>
int visit_instances(const NasaParams& p, int dtype, int d, const Visit& visit) {
  const int error = check_call(p, dtype, d);
  if (error != kOk) return error;
  switch (d) {
    case 40:
      return visit_dtypes<40>(p, dtype, visit);
    case 64:
      return visit_dtypes<64>(p, dtype, visit);
    case 72:
      return visit_dtypes<72>(p, dtype, visit);
    case 80:
      return visit_dtypes<80>(p, dtype, visit);
    default:
      return visit_dtypes<160>(p, dtype, visit);
  }
}

struct LaunchVisit {
  const NasaParams& p;
  int limit;  // bytes of shared memory
  void* stream;
  template <typename Kernel, typename S>
  int instance() const {
    const int bytes = Kernel::shared_bytes(p);
    if (bytes > limit) return kNoSharedMemory;
    const int error = launch<Kernel>(Kernel::grid(p), bytes, stream, p);
    return error == 0 ? kOk : kDeviceError + error;
  }
};

// Enqueues the call on the stream of the current device. No allocation, no wait.
inline int nasa_launch(const NasaParams& p, int dtype, int d, void* stream) {
  const int limit = shared_limit();
  if (limit < 0) return kDeviceError - limit;
  return visit_instances(p, dtype, d, LaunchVisit{p, limit, stream});
}

// What a NasaError means.
inline const char* nasa_error_text(int error) {
  return error > kDeviceError ? device_error_name(error - kDeviceError) : nasa_error_name(error);
}

// Why no call can run on the current device, or null. One instance stands for all: they are
// compiled for the same devices.
inline const char* nasa_trouble() {
  const int error =
      kernel_trouble<PlainKernel<NASA_ONLY_DIM == 0 ? 40 : NASA_ONLY_DIM>, NasaParams>();
  return error == 0 ? nullptr : device_error_name(error);
}

// projects_well on the current device.
inline bool nasa_projects(const NasaParams& p, int dtype, int d, int c_out) {
  return projects_well(p, dtype, d, c_out, device_processors(), device_capability());
}

struct QueryVisit {
  const NasaParams& p;
  int limit;
  NasaInstance* found;
  template <typename Kernel, typename S>
  int instance() const {
    const int bytes = Kernel::shared_bytes(p);
    if (bytes > limit) return kNoSharedMemory;
    const Grid grid = Kernel::grid(p);
    *found = {S::kRows, S::kThreads, S::KT, 1, S::kSingle, 0, bytes, 0};
    found->blocks = static_cast<int>(grid.x * grid.y * grid.z);
    if constexpr (!std::is_same<Kernel, PlainKernel<S::D>>::value) {
      found->stages = S::kStages;
      found->project = S::kProject;
    }
    return kOk;
  }
};

// What nasa_launch would launch on a device whose blocks may have `limit` bytes of shared memory.
inline int nasa_query(const NasaParams& p, int dtype, int d, int limit, NasaInstance* found) {
  return visit_instances(p, dtype, d, QueryVisit{p, limit, found});
}

}  // namespace SIMT_BACKEND
}  // namespace snoopi
