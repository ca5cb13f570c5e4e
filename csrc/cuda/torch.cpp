// snoopi's attention ops on the kernels of csrc/cuda, by libtorch's stable ABI: one binary serves
// several torch versions (2.13 and later), and nothing of CUDA's is linked but the runtime.
//
// Compiled twice: with the kernels of nvcc for the key CUDA, and with their emulation on the host,
// for tests, in a namespace of its own (SNOOPI_EMULATED), so that shapes, strides, broadcasts and
// masks are tested without a GPU. No call waits for the device or allocates but its outputs, and
// copies of what the kernel cannot read as it lies: calls can be recorded as CUDA graphs.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "nasa_params.h"

#ifdef SNOOPI_EMULATED
#define SNOOPI_FORWARD snoopi_nasa_emulated
#define SNOOPI_PROJECTS snoopi_nasa_emulated_projects
#define SNOOPI_ERROR snoopi_nasa_emulated_error
#else
#define SNOOPI_FORWARD snoopi_nasa_cuda
#define SNOOPI_PROJECTS snoopi_nasa_cuda_projects
#define SNOOPI_ERROR snoopi_nasa_cuda_error
#endif

extern "C" int SNOOPI_FORWARD(const snoopi::NasaParams* params, int dtype, int head_dim,
                              void* stream);
extern "C" int SNOOPI_PROJECTS(const snoopi::NasaParams* params, int dtype, int head_dim,
                               int c_out);
extern "C" const char* SNOOPI_ERROR(int error);

namespace snoopi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kVersion = 2;  // of these ops, compared by snoopi/ops/native.py
constexpr int64_t kAlignment = 16;

int dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return kHalf;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Float:
      return kFloat;
    default:
      STD_TORCH_CHECK(false, "snoopi: expected float16, bfloat16 or float32");
  }
}

int64_t bytes_of(const Tensor& x) { return x.scalar_type() == ScalarType::Float ? 4 : 2; }

bool aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kAlignment == 0;
}

// [. . . d] as the kernel reads it: unit stride in d, every row on 16 bytes. A dimension of one
// is never stepped over, so its stride does not matter.
Tensor readable(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  bool fits = x.size(last) == 1 || x.stride(last) == 1;
  for (int64_t i = 0; i < last; ++i) {
    fits = fits && (x.size(i) == 1 || x.stride(i) * bytes_of(x) % kAlignment == 0);
  }
  if (fits && aligned(x)) return x;
  const Tensor copy = torch::stable::contiguous(x);
  return aligned(copy) ? copy : torch::stable::clone(copy);
}

void set_strides(const Tensor& x, int64_t (&strides)[3], bool may_share) {
  for (int i = 0; i < 3; ++i) strides[i] = x.size(i) == 1 ? 0 : x.stride(i);
  if (!may_share) STD_TORCH_CHECK(x.dim() == 4, "snoopi: expected 4 dimensions");
}

// q's device is the current one as long as this lives.
#ifdef SNOOPI_EMULATED
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
};
#else
struct OnDevice {
  const torch::stable::accelerator::DeviceIndex index;
  const torch::stable::accelerator::DeviceGuard guard;
  explicit OnDevice(const Tensor& q) : index(q.get_device_index()), guard(index) {}
  void* stream() const {
    return torch::stable::accelerator::getCurrentStream(index).nativeHandle();
  }
};
#endif

// A call and the tensors its pointers lie in.
struct Call {
  NasaParams params = {};
  int dtype;
  int64_t d;
  std::vector<Tensor> kept;

  const Tensor& keep(Tensor x) {
    kept.push_back(std::move(x));
    return kept.back();
  }

  Call(const Tensor& q, double softmax_scale) : dtype(dtype_of(q)) {
    STD_TORCH_CHECK(q.dim() == 4, "snoopi: q must be [b m h d], got ", q.dim(), " dimensions");
    kept.reserve(24);  // what is kept stays where it is
    const Tensor& x = keep(readable(q));
    params.q = x.const_data_ptr();
    set_strides(x, params.q_stride, false);
    params.b = x.size(0), params.m = x.size(1), params.h = x.size(2), d = x.size(3);
    params.softmax_scale = static_cast<float>(softmax_scale);
  }

  // k, v [b|1 n h d], mask bool [b|1 n].
  void add_text(const Tensor& k, const Tensor& v, const OptionalTensor& mask) {
    STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4, "snoopi: k and v must be [b n h d]");
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(k.size(i) == v.size(i), "snoopi: v must have the shape of k");
    }
    const bool shared = k.size(0) == 1 || k.size(0) == params.b;
    STD_TORCH_CHECK(shared && k.size(2) == params.h && k.size(3) == d,
                    "snoopi: k must be [b|1 n h d] with b=", params.b, " h=", params.h, " d=", d);
    STD_TORCH_CHECK(dtype_of(k) == dtype && dtype_of(v) == dtype,
                    "snoopi: k and v must have the dtype of q");
    NasaText& text = params.texts[params.num_texts++];
    const Tensor& keys = keep(readable(k));
    const Tensor& values = keep(readable(v));
    text.k = keys.const_data_ptr(), text.v = values.const_data_ptr();
    text.n = k.size(1);
    set_strides(keys, text.k_stride, true);
    set_strides(values, text.v_stride, true);
    if (!mask.has_value()) return;
    STD_TORCH_CHECK(mask->dim() == 2 && mask->scalar_type() == ScalarType::Bool &&
                        mask->size(1) == text.n &&
                        (mask->size(0) == 1 || mask->size(0) == params.b),
                    "snoopi: a mask must be bool [b|1 n] with n=", text.n);
    const bool unit = mask->stride(1) == 1 || text.n == 1;
    const Tensor& flags = keep(unit ? *mask : torch::stable::contiguous(*mask));
    text.mask = static_cast<const uint8_t*>(flags.const_data_ptr());
    text.mask_stride = flags.size(0) == 1 ? 0 : flags.stride(0);
  }

  void set_strength(const OptionalTensor& strength, double scale) {
    params.nasa_scale = static_cast<float>(scale);
    if (!strength.has_value()) return;
    STD_TORCH_CHECK(
        strength->dim() == 2 && strength->size(0) == params.b && strength->size(1) == params.m,
        "snoopi: strength must be [b m]");
    const Tensor& a = keep(torch::stable::to(*strength, ScalarType::Float));
    params.strength = static_cast<const float*>(a.const_data_ptr());
    for (int i = 0; i < 2; ++i) params.strength_stride[i] = a.size(i) == 1 ? 0 : a.stride(i);
  }

  // Takes the projection into the kernel, if that should be faster there and the kernel can read
  // the weights as they lie.
  bool project(const OnDevice&, const Tensor& weight, const OptionalTensor& bias) {
    const int64_t c_out = weight.size(0);
    const auto fits = [&](const Tensor& x) { return x.is_contiguous() && dtype_of(x) == dtype; };
    if (c_out == 0 || c_out > INT32_MAX || params.b * params.m * params.h == 0) return false;
    if (!fits(weight) || !aligned(weight) || (bias.has_value() && !fits(*bias))) return false;
    const int wide = static_cast<int>(c_out);
    if (!SNOOPI_PROJECTS(&params, dtype, static_cast<int>(d), wide)) return false;
    params.w_out = weight.const_data_ptr(), params.c_out = c_out;
    params.b_out = bias.has_value() ? bias->const_data_ptr() : nullptr;
    return true;
  }

  // Runs on the device's current stream, without waiting.
  void run(const OnDevice& device) {
    if (params.b * params.m * params.h == 0) return;
    const int error = SNOOPI_FORWARD(&params, dtype, static_cast<int>(d), device.stream());
    STD_TORCH_CHECK(error == kOk,
                    "snoopi: the attention kernel refused a call: ", SNOOPI_ERROR(error));
  }
};

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// SNOOPI Eq. 8-10: attention to each text, Z+ - a Z- (or Z+ - a (Z- - Z0)), and the projection,
// mostly by aten::linear: the kernel that projects as well has few blocks (docs/cuda.md).
Tensor nasa_attention(const Tensor& q, const Tensor& k_pos, const Tensor& v_pos,
                      const Tensor& k_neg, const Tensor& v_neg, const OptionalTensor& w_out,
                      const OptionalTensor& b_out, const OptionalTensor& k_null,
                      const OptionalTensor& v_null, const OptionalTensor& mask_pos,
                      const OptionalTensor& mask_neg, const OptionalTensor& mask_null,
                      const OptionalTensor& strength, double nasa_scale, double softmax_scale) {
  Call call(q, softmax_scale);
  call.add_text(k_pos, v_pos, mask_pos);
  call.add_text(k_neg, v_neg, mask_neg);
  if (k_null.has_value() && v_null.has_value()) call.add_text(*k_null, *v_null, mask_null);
  call.set_strength(strength, nasa_scale);
  const OnDevice device(q);
  if (w_out.has_value() && call.project(device, *w_out, b_out)) {
    const int64_t sizes[3] = {q.size(0), q.size(1), w_out->size(0)};
    const Tensor out = torch::stable::new_empty(q, {sizes, 3});
    call.params.out[0] = out.mutable_data_ptr();
    call.run(device);
    return out;
  }
  const Tensor z = torch::stable::new_empty(q, q.sizes());
  call.params.out[0] = z.mutable_data_ptr();
  call.run(device);
  if (!w_out.has_value()) return z;
  return linear(torch::stable::flatten(z, 2, 3), *w_out, b_out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> twin_attention(const Tensor& q, const Tensor& k_pos,
                                                          const Tensor& v_pos, const Tensor& k_neg,
                                                          const Tensor& v_neg,
                                                          const OptionalTensor& mask_pos,
                                                          const OptionalTensor& mask_neg,
                                                          double softmax_scale) {
  Call call(q, softmax_scale);
  call.add_text(k_pos, v_pos, mask_pos);
  call.add_text(k_neg, v_neg, mask_neg);
  call.params.twin = 1;
  std::array<Tensor, 2> z, lse;
  const int64_t rows[3] = {q.size(0), q.size(1), q.size(2)};
  for (int i = 0; i < 2; ++i) {
    z[i] = torch::stable::new_empty(q, q.sizes());
    lse[i] = torch::stable::new_empty(q, {rows, 3}, ScalarType::Float);
    call.params.out[i] = z[i].mutable_data_ptr();
    call.params.lse[i] = static_cast<float*>(lse[i].mutable_data_ptr());
  }
  call.run(OnDevice(q));
  return {z[0], lse[0], z[1], lse[1]};
}

#ifndef SNOOPI_EMULATED
int64_t cuda_version() { return kVersion; }
#endif

}  // namespace
}  // namespace snoopi

#ifdef SNOOPI_EMULATED
STABLE_TORCH_LIBRARY(snoopi_emulated, m) {
  m.def(
      "nasa_attention(Tensor q, Tensor k_pos, Tensor v_pos, Tensor k_neg, Tensor v_neg, "
      "Tensor? w_out, Tensor? b_out, Tensor? k_null, Tensor? v_null, Tensor? mask_pos, "
      "Tensor? mask_neg, Tensor? mask_null, Tensor? strength, float nasa_scale, "
      "float softmax_scale) -> Tensor");
  m.def(
      "twin_attention(Tensor q, Tensor k_pos, Tensor v_pos, Tensor k_neg, Tensor v_neg, "
      "Tensor? mask_pos, Tensor? mask_neg, float softmax_scale) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(snoopi_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(snoopi, m) { m.def("cuda_version() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(snoopi, CompositeExplicitAutograd, m) {
  m.impl("cuda_version", TORCH_BOX(&snoopi::cuda_version));
}
STABLE_TORCH_LIBRARY_IMPL(snoopi, CUDA, m) {
#endif
  m.impl("nasa_attention", TORCH_BOX(&snoopi::nasa_attention));
  m.impl("twin_attention", TORCH_BOX(&snoopi::twin_attention));
}
