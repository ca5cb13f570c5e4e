// What the glue hands to a kernel: one cross-attention call to one, two or three texts.
// Free of torch, so that it can be compiled for any processor without a foreign inline function.
#pragma once

#include <stdint.h>

namespace snoopi {

constexpr int kMaxTexts = 3;

// Keys and values of one text. Strides are in elements, for (batch, token, head); the head dim has
// unit stride. A text that serves the whole batch has batch stride 0.
struct Text {
  const void* k;
  const void* v;
  const bool* mask;  // [b n] with unit stride over n, true = attend; null: every key is live
  int64_t n;
  int64_t k_stride[3];
  int64_t v_stride[3];
  int64_t mask_stride;
};

// z = sum over texts of weight_t * softmax(softmax_scale q k_t^T) v_t with weights 1, -a, +a
// (positive, negative, null text). With `twin`, every text has an output of its own, of weight 1.
struct Attention {
  int64_t b, m, h, d;
  const void* q;
  int64_t q_stride[3];  // (batch, token, head)
  int num_texts;
  Text texts[kMaxTexts];
  double softmax_scale;
  double nasa_scale;     // a, unless there is a strength
  const void* strength;  // a by query [b m], contiguous, in the accumulator's type; or null
  bool twin;
  void* z[kMaxTexts];    // [b m h d] contiguous; only z[0] without `twin`
  void* lse[kMaxTexts];  // [b m h] contiguous, in the accumulator's type; null without `twin`
};

// Query rows [m_begin, m_end) of one head of one batch item.
struct Task {
  int64_t b, h, m_begin, m_end;
};

// One element type's kernel. `scratch` is `scratch_bytes` of memory aligned to 64 bytes.
struct Kernel {
  int64_t (*scratch_bytes)(const Attention&);
  void (*run)(const Attention&, const Task&, void* scratch);
  int64_t tile_rows;
};

struct Kernels {
  Kernel f32, bf16, f64;
};

// One set per processor capability, each compiled from kernel.cpp with its own flags.
extern const Kernels kernels_default;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace snoopi
