// The CPU implementations of snoopi::nasa_attention and snoopi::twin_attention: checks, fills an
// `Attention`, hands its tasks to the threads. Single ATen headers only: torch/extension.h takes
// seven times as long to compile.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "attention.h"

namespace snoopi {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The Python side reads this from the file before it loads it: a library for another torch may
// load and then crash.
__attribute__((used)) const char kBuiltFor[] = "SNOOPI_BUILT_FOR_TORCH=" TORCH_VERSION;

const Kernels& kernels_here() {
#if defined(__x86_64__)
  // torch's own choice, so that ATEN_CPU_CAPABILITY holds for this op as well.
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return kernels_avx512;
  if (capability == "AVX2") return kernels_avx2;
#endif
  return kernels_default;
}

const Kernel& kernel_for(at::ScalarType type) {
  const Kernels& kernels = kernels_here();
  if (type == at::kDouble) return kernels.f64;
  return type == at::kBFloat16 ? kernels.bf16 : kernels.f32;
}

// A type with no kernel of its own is computed in fp32.
at::ScalarType computing_type(at::ScalarType type) {
  return type == at::kDouble || type == at::kBFloat16 ? type : at::kFloat;
}

at::ScalarType accumulator(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// The tensor in `type` with unit stride in its last dim.
Tensor readable(const Tensor& x, at::ScalarType type) {
  const Tensor y = x.to(type);
  return y.stride(-1) == 1 || y.size(-1) == 1 ? y : y.contiguous();
}

// A call and the tensors its pointers lie in.
struct Call {
  Attention attention = {};
  Tensor kept[16];
  int num_kept = 0;

  const Tensor& keep(Tensor x) {
    kept[num_kept] = std::move(x);
    return kept[num_kept++];
  }
};

void set_query(Call& call, const Tensor& q, at::ScalarType type) {
  TORCH_CHECK(q.dim() == 4, "snoopi: q must be [b m h d], got ", q.sizes());
  const Tensor& x = call.keep(readable(q, type));
  Attention& attention = call.attention;
  attention.b = x.size(0), attention.m = x.size(1), attention.h = x.size(2),
  attention.d = x.size(3);
  attention.q = x.const_data_ptr();
  for (int i = 0; i < 3; ++i) attention.q_stride[i] = x.stride(i);
}

void add_text(Call& call, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
              at::ScalarType type) {
  Attention& attention = call.attention;
  TORCH_CHECK(k.dim() == 4 && (k.size(0) == attention.b || k.size(0) == 1) &&
                  k.size(2) == attention.h && k.size(3) == attention.d,
              "snoopi: k must be [b n h d] with h=", attention.h, " d=", attention.d, ", got ",
              k.sizes());
  TORCH_CHECK(v.sizes() == k.sizes(), "snoopi: v must be ", k.sizes(), " like k, got ", v.sizes());
  const Tensor& keys = call.keep(readable(k, type));
  const Tensor& values = call.keep(readable(v, type));
  Text& text = attention.texts[attention.num_texts++];
  text.k = keys.const_data_ptr();
  text.v = values.const_data_ptr();
  text.n = k.size(1);
  for (int i = 0; i < 3; ++i) {
    const bool shared = i == 0 && k.size(0) == 1;
    text.k_stride[i] = shared ? 0 : keys.stride(i);
    text.v_stride[i] = shared ? 0 : values.stride(i);
  }
  if (!mask.has_value()) return;
  TORCH_CHECK(mask->scalar_type() == at::kBool && mask->dim() == 2 && mask->size(1) == text.n &&
                  (mask->size(0) == attention.b || mask->size(0) == 1),
              "snoopi: a mask must be bool [b n], got ", mask->sizes());
  const Tensor& live = call.keep(mask->contiguous());
  text.mask = live.const_data_ptr<bool>();
  text.mask_stride = mask->size(0) == 1 ? 0 : text.n;
}

void set_strength(Call& call, const OptionalTensor& strength, double nasa_scale,
                  at::ScalarType type) {
  call.attention.nasa_scale = nasa_scale;
  if (!strength.has_value()) return;
  TORCH_CHECK(strength->dim() == 2 && strength->size(0) == call.attention.b &&
                  strength->size(1) == call.attention.m,
              "snoopi: strength must be [b m], got ", strength->sizes());
  const Tensor& a = call.keep(strength->to(accumulator(type)).contiguous());
  call.attention.strength = a.const_data_ptr();
}

// Rows of one head that a thread takes at once: all of them, unless that leaves threads idle.
int64_t rows_per_task(const Attention& attention, const Kernel& kernel) {
  constexpr int64_t kTasksPerThread = 4, kFewestRows = 128;
  const int64_t wanted = at::get_num_threads() > 1 ? kTasksPerThread * at::get_num_threads() : 1;
  const int64_t heads = std::max<int64_t>(attention.b * attention.h, 1);
  const int64_t pieces = at::divup(wanted, heads);
  const int64_t rows = std::max(at::divup(attention.m, pieces), kFewestRows);
  return at::divup(rows, kernel.tile_rows) * kernel.tile_rows;
}

void run(const Attention& attention, at::ScalarType type) {
  if (attention.b == 0 || attention.m == 0 || attention.h == 0) return;
  const Kernel& kernel = kernel_for(type);
  const int64_t rows = rows_per_task(attention, kernel);
  const int64_t pieces = at::divup(attention.m, rows);
  const int64_t tasks = attention.b * attention.h * pieces;
  int64_t keys = 0;
  for (int t = 0; t < attention.num_texts; ++t) keys += attention.texts[t].n;
  // Below about a million multiply-adds a thread costs more than it brings.
  const int64_t work = std::max<int64_t>(std::min(rows, attention.m) * keys * attention.d * 2, 1);
  const int64_t grain = std::max<int64_t>(1000000 / work, 1);
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const size_t bytes = static_cast<size_t>((kernel.scratch_bytes(attention) + 63) / 64 * 64);
    const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes),
                                                              &std::free);
    TORCH_CHECK(scratch != nullptr, "snoopi: no memory for ", bytes, " bytes of scratch");
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / pieces, m = i % pieces * rows;
      const Task task = {head / attention.h, head % attention.h, m,
                         std::min(m + rows, attention.m)};
      kernel.run(attention, task, scratch.get());
    }
  });
}

Tensor nasa_attention(const Tensor& q, const Tensor& k_pos, const Tensor& v_pos,
                      const Tensor& k_neg, const Tensor& v_neg, const OptionalTensor& w_out,
                      const OptionalTensor& b_out, const OptionalTensor& k_null,
                      const OptionalTensor& v_null, const OptionalTensor& mask_pos,
                      const OptionalTensor& mask_neg, const OptionalTensor& mask_null,
                      const OptionalTensor& strength, double nasa_scale, double softmax_scale) {
  // Precision was decided by the caller; the projection below must not decide again.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::ScalarType type = computing_type(q.scalar_type());
  Call call;
  set_query(call, q, type);
  add_text(call, k_pos, v_pos, mask_pos, type);
  add_text(call, k_neg, v_neg, mask_neg, type);
  if (k_null.has_value() && v_null.has_value()) add_text(call, *k_null, *v_null, mask_null, type);
  set_strength(call, strength, nasa_scale, type);
  call.attention.softmax_scale = softmax_scale;
  Tensor z = at::empty(q.sizes(), q.options().dtype(type));  // [b m h d]
  call.attention.z[0] = z.mutable_data_ptr();
  run(call.attention, type);
  if (z.scalar_type() != q.scalar_type()) z = z.to(q.scalar_type());
  if (!w_out.has_value()) return z;
  return at::linear(z.flatten(2), *w_out, b_out);  // [b m c_out]
}

std::tuple<Tensor, Tensor, Tensor, Tensor> twin_attention(const Tensor& q, const Tensor& k_pos,
                                                          const Tensor& v_pos, const Tensor& k_neg,
                                                          const Tensor& v_neg,
                                                          const OptionalTensor& mask_pos,
                                                          const OptionalTensor& mask_neg,
                                                          double softmax_scale) {
  const at::ScalarType type = computing_type(q.scalar_type());
  Call call;
  set_query(call, q, type);
  add_text(call, k_pos, v_pos, mask_pos, type);
  add_text(call, k_neg, v_neg, mask_neg, type);
  call.attention.softmax_scale = softmax_scale;
  call.attention.twin = true;
  Tensor z[2], lse[2];
  for (int t = 0; t < 2; ++t) {
    z[t] = at::empty(q.sizes(), q.options().dtype(type));
    lse[t] = at::empty(q.sizes().slice(0, 3), q.options().dtype(accumulator(type)));
    call.attention.z[t] = z[t].mutable_data_ptr();
    call.attention.lse[t] = lse[t].mutable_data_ptr();
  }
  run(call.attention, type);
  return {z[0].to(q.scalar_type()), lse[0], z[1].to(q.scalar_type()), lse[1]};
}

}  // namespace
}  // namespace snoopi

TORCH_LIBRARY_IMPL(snoopi, CPU, m) {
  m.impl("nasa_attention", &snoopi::nasa_attention);
  m.impl("twin_attention", &snoopi::twin_attention);
}
