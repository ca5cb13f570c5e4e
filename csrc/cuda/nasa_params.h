// What a caller hands to the kernels. Plain data, free of torch; tests mirror it in Python.
//
// b batch, m query tokens, n text tokens, h heads, d head dim. Strides are in elements.
#pragma once

#include <stdint.h>

namespace snoopi {

constexpr int kMaxTexts = 3;

enum DType : int { kHalf = 0, kBFloat16 = 1, kFloat = 2 };

// Keys and values of one text, unit stride in the head dim. Batch stride 0: one text serves all.
struct NasaText {
  const void* k;
  const void* v;
  const uint8_t* mask;  // bool [b n], unit stride in n, nonzero: attend; null: all keys
  int64_t n;
  int64_t k_stride[3];  // (batch, token, head)
  int64_t v_stride[3];
  int64_t mask_stride;  // of the batch
};

// One call. With weights w = (1, -a, a) for the positive, negative and null text,
//   z = sum over texts of w_t softmax(softmax_scale q k_t^T) v_t       (SNOOPI Eq. 8-10)
// and out = z w_out^T + b_out, or z itself without w_out. A twin call has two texts, whose
// attentions are kept apart. A text without a live key counts for nothing (its lse is -inf).
struct NasaParams {
  const void* q;
  int64_t q_stride[3];  // (batch, token, head)
  int64_t b, m, h;
  NasaText texts[kMaxTexts];
  int num_texts;  // 1 to 3
  int twin;
  float softmax_scale;    // above 0
  float nasa_scale;       // a, unless there is a strength
  const float* strength;  // a by query [b m], or null
  int64_t strength_stride[2];
  const void* w_out;  // [c_out h*d] contiguous, or null
  const void* b_out;  // [c_out] or null
  int64_t c_out;
  void* out[2];  // contiguous: [b m c_out] with w_out, else [b m h d]; twin: by text
  float*
      lse[kMaxTexts];  // [b m h] contiguous, natural log with the scale included; any may be null
};

// What nasa_launch returns. All but the last are known before anything is launched.
enum NasaError : int {
  kOk = 0,
  kBadDType,
  kBadHeadDim,
  kBadTexts,        // their number or lengths, or a twin call without two texts
  kBadScale,        // softmax_scale is not above 0
  kBadProjection,   // fp32, a twin call, or more than kMaxProjected channels: project afterwards
  kMisaligned,      // a pointer or stride is no multiple of 16 bytes
  kTooLarge,        // for the grid, or a stride for 32 bits
  kNoSharedMemory,  // no instance fits the device
  kDeviceError,     // and all above: less this, an error of the device's (of CUDA's runtime)
};

// Of the errors below kDeviceError.
inline const char* nasa_error_name(int error) {
  static const char* const names[] = {
      "ok",         "dtype",     "head dim",         "texts",        "softmax scale",
      "projection", "alignment", "size of the call", "shared memory"};
  return error >= 0 && error < kDeviceError ? names[error] : "unknown";
}

// What a call would launch.
struct NasaInstance {
  int rows;  // of a block
  int threads;
  int key_tile;
  int stages;
  int single;  // each text is one tile
  int project;
  int shared_bytes;
  int blocks;
};

constexpr int kMaxTextLength = 512;
constexpr int kMaxProjected = 640;  // channels h*d that the kernel projects itself

}  // namespace snoopi
