// What the glue hands to a kernel. Free of torch, so that it can be compiled for any processor
// without a foreign inline function.
#pragma once

#include <stdint.h>

namespace snoopi {

constexpr int kMaxTexts = 3;

// Keys and values of one text as they come. Strides are in elements, for (batch, token, head); the
// head dim has unit stride. A text that serves the whole batch has batch stride 0.
struct Text {
  const void* k;
  const void* v;
  int64_t n, d;
  int64_t k_stride[3];
  int64_t v_stride[3];
};

// Keys and values of one text in a kernel's own layout: for every (batch, head)
// `Kernel::text_bytes` of memory, of which only the live keys are filled.
struct PackedText {
  const char* data;
  int64_t batch_stride;  // bytes; 0: one text serves the whole batch
  int64_t head_stride;   // bytes
  const int32_t* live;   // live keys, by batch item
  int64_t live_stride;   // 0: one count serves the whole batch
  int64_t n;             // keys there is room for
};

// How the texts' attentions Z+ (positive), Z- (negative) and Z0 (null) become one output, or
// several. `a` is the strength.
enum class Combine {
  kNASA,  // Z+ - a Z- + a Z0
  kTwin,  // every text has an output of its own, and its log-sum-exp
  kVSF,   // one softmax over both texts, the negative logits lowered by `bias`, its values times -a
  kNAG,   // blend z + (1 - blend) Z+ with z = Z+ + a (Z+ - Z-), its norm kept below tau times Z+'s
};

// One cross-attention call. Z = softmax(softmax_scale q k^T) v of a text, then the combination,
// then with a projection out = z w^T + bias.
struct Attention {
  int64_t b, m, h, d;
  const void* q;
  int64_t q_stride[3];  // (batch, token, head)
  int num_texts;
  PackedText texts[kMaxTexts];
  double softmax_scale;
  Combine combine;
  double scale;          // a, unless there is a strength
  const void* strength;  // a by query [b m], contiguous, in the accumulator's type; or null
  double vsf_bias;
  double nag_tau, nag_blend;
  int nag_norm;      // 1 or 2, over all heads of a row
  const void* w;     // [c_out h*d] in the kernel's layout; null: no projection
  const void* bias;  // [c_out] in the accumulator's type, or null
  int64_t c_out;
  void*
      out[kMaxTexts];  // contiguous: [b m c_out] with a projection, else [b m h d]; by text if twin
  void* lse[kMaxTexts];  // [b m h] contiguous, in the accumulator's type; twin only
  int64_t rows;          // most query rows of a task
};

// Query rows [m_begin, m_end) of one batch item, all heads.
struct Task {
  int64_t b, m_begin, m_end;
};

}  // namespace snoopi
