// The CPU implementations of snoopi's ops: checks, packs what is not packed, fills an `Attention`,
// hands its tasks to the threads.
#include <ATen/Parallel.h>
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
#include <utility>

#include "glue.h"

namespace snoopi {
namespace {

// The Python side reads this from the file before it loads it: a library for another torch may
// load and then crash.
__attribute__((used)) const char kBuiltFor[] = "SNOOPI_BUILT_FOR_TORCH=" TORCH_VERSION;

// One text as the kernel reads it: data [b|1 h bytes] and the number of live keys [b|1].
struct Packed {
  Tensor data, live;
  int64_t n = 0;
};

// Where nothing lies, behind the live keys, there are zeros if `clean`.
Packed pack(const Tensor& k, const Tensor& v, const OptionalTensor& mask, at::ScalarType type,
            bool clean = false) {
  TORCH_CHECK(k.dim() == 4 && k.size(1) > 0, "snoopi: k must be [b n h d], got ", k.sizes());
  TORCH_CHECK(v.sizes() == k.sizes(), "snoopi: v must be ", k.sizes(), " like k, got ", v.sizes());
  const Kernel& kernel = kernel_for(type);
  const Tensor keys = readable(k, type), values = readable(v, type);
  Text text = {keys.const_data_ptr(), values.const_data_ptr(), k.size(1), k.size(3), {}, {}};
  int64_t b = k.size(0);
  const int64_t n = k.size(1), h = k.size(2);
  Tensor order;  // [b n]: positions of the live keys
  if (mask.has_value()) {
    TORCH_CHECK(mask->scalar_type() == at::kBool && mask->dim() == 2 && mask->size(1) == n &&
                    (mask->size(0) == b || mask->size(0) == 1 || b == 1),
                "snoopi: a mask must be bool [b n] with n=", n, ", got ", mask->sizes());
    b = std::max(b, mask->size(0));
    order = at::empty({b, n}, at::TensorOptions(at::kInt));
  }
  for (int i = 0; i < 3; ++i) {
    const bool shared = i == 0 && k.size(0) == 1;
    text.k_stride[i] = shared ? 0 : keys.stride(i);
    text.v_stride[i] = shared ? 0 : values.stride(i);
  }
  Packed packed = {bytes({b, h, kernel.text_bytes(n, text.d)}),
                   at::empty({b}, at::TensorOptions(at::kInt)), n};
  if (clean) packed.data.zero_();
  int32_t* live = packed.live.mutable_data_ptr<int32_t>();
  std::fill_n(live, b, static_cast<int32_t>(n));
  int32_t* positions = order.defined() ? order.mutable_data_ptr<int32_t>() : nullptr;
  if (mask.has_value()) {
    const Tensor flags = mask->contiguous();
    for (int64_t i = 0; i < b; ++i) {
      const bool* row = flags.const_data_ptr<bool>() + (mask->size(0) == 1 ? 0 : i * n);
      live[i] = 0;
      for (int64_t j = 0; j < n; ++j) {
        if (row[j]) positions[i * n + live[i]++] = static_cast<int32_t>(j);
      }
    }
  }
  const int64_t size = packed.data.size(2);
  char* data = static_cast<char*>(packed.data.mutable_data_ptr());
  parallel(b * h, size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t item = i / h;
      if (live[item] == 0) continue;
      kernel.pack_text(text, item, i % h, positions == nullptr ? nullptr : positions + item * n,
                       live[item], data + i * size);
    }
  });
  return packed;
}

// A call and the tensors its pointers lie in.
struct Call {
  Attention attention = {};
  at::ScalarType type;  // of the computation
  const Kernel& kernel;
  Tensor kept[16];
  int num_kept = 0;

  const Tensor& keep(Tensor x) {
    kept[num_kept] = std::move(x);
    return kept[num_kept++];
  }

  explicit Call(const Tensor& q, double softmax_scale)
      : type(computing_type(q.scalar_type())), kernel(kernel_for(type)) {
    TORCH_CHECK(q.dim() == 4, "snoopi: q must be [b m h d], got ", q.sizes());
    const Tensor& x = keep(readable(q, type));
    attention.b = x.size(0), attention.m = x.size(1), attention.h = x.size(2);
    attention.d = x.size(3);
    attention.q = x.const_data_ptr();
    for (int i = 0; i < 3; ++i) attention.q_stride[i] = x.stride(i);
    attention.softmax_scale = softmax_scale;
  }

  void add_text(const Packed& text) {
    const int64_t b = attention.b, h = attention.h;
    const int64_t size = kernel.text_bytes(text.n, attention.d);
    const auto fits = [&](const Tensor& x) { return x.size(0) == b || x.size(0) == 1; };
    TORCH_CHECK(text.data.dim() == 3 && fits(text.data) && text.data.size(1) == h &&
                    text.data.size(2) == size && text.data.is_contiguous() &&
                    text.data.scalar_type() == at::kByte,
                "snoopi: a packed text must be [b h ", size, "] bytes with b=", b, " or 1, h=", h,
                ", got ", text.data.sizes(), "; pack_text makes it, for this processor");
    TORCH_CHECK(text.live.dim() == 1 && fits(text.live) && text.live.scalar_type() == at::kInt &&
                    text.live.is_contiguous(),
                "snoopi: live keys must be int32 [b], got ", text.live.sizes());
    const int32_t* live = text.live.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < text.live.size(0); ++i) {
      TORCH_CHECK(live[i] >= 0 && live[i] <= text.n, "snoopi: live keys must be 0 to ", text.n,
                  ", got ", live[i]);
    }
    PackedText& to = attention.texts[attention.num_texts++];
    to.data = static_cast<const char*>(keep(text.data).const_data_ptr());
    to.head_stride = size;
    to.batch_stride = text.data.size(0) == 1 ? 0 : h * size;
    to.live = keep(text.live).const_data_ptr<int32_t>();
    to.live_stride = text.live.size(0) == 1 ? 0 : 1;
    to.n = text.n;
  }

  void set_strength(const OptionalTensor& strength, double scale) {
    attention.scale = scale;
    if (!strength.has_value()) return;
    TORCH_CHECK(strength->dim() == 2 && strength->size(0) == attention.b &&
                    strength->size(1) == attention.m,
                "snoopi: strength must be [b m], got ", strength->sizes());
    attention.strength = keep(strength->to(accumulator(type)).contiguous()).const_data_ptr();
  }

  void set_projection(const Tensor& packed, const OptionalTensor& bias, int64_t c_out) {
    const int64_t size = kernel.linear_bytes(c_out, attention.h * attention.d);
    TORCH_CHECK(packed.dim() == 1 && packed.size(0) == size && packed.scalar_type() == at::kByte &&
                    packed.is_contiguous(),
                "snoopi: a packed weight must be [", size, "] bytes, got ", packed.sizes(),
                "; pack_linear makes it, for this processor");
    attention.w = keep(packed).const_data_ptr();
    attention.c_out = c_out;
    if (!bias.has_value()) return;
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == c_out, "snoopi: b_out must be [", c_out,
                "], got ", bias->sizes());
    attention.bias = keep(bias->to(accumulator(type)).contiguous()).const_data_ptr();
  }

  // Where the result goes: [b m c_out], or [b m h d] without a projection.
  Tensor result(const Tensor& q) {
    at::DimVector sizes(q.sizes());
    if (attention.w != nullptr) sizes = {attention.b, attention.m, attention.c_out};
    Tensor out = at::empty(sizes, q.options().dtype(type));
    attention.out[0] = out.mutable_data_ptr();
    return out;
  }

  // Query rows of a task. A task walks through all keys, values and weights once, so it should have
  // many rows; but there should be a task for each thread, and rows that are kept, of one attention
  // or two, stay in the second cache.
  int64_t rows_of_a_task() const {
    constexpr int64_t kFewest = 32, kUnkept = 2048;
    const int64_t kept = attention.combine == Combine::kNAG ? 2 : attention.w == nullptr ? 0 : 1;
    const int64_t most = kept == 0 ? kUnkept : kernel.most_rows / kept;
    const int64_t threads = at::get_num_threads();
    int64_t tasks = attention.b * at::divup(attention.m, most);
    tasks = at::divup(tasks, threads) * threads;
    const int64_t rows = at::divup(attention.m, at::divup(tasks, attention.b));
    return std::max(rows, std::min(kFewest, attention.m));
  }

  void run() {
    if (attention.b == 0 || attention.m == 0 || attention.h == 0) return;
    attention.rows = rows_of_a_task();
    const int64_t pieces = at::divup(attention.m, attention.rows);
    int64_t width = attention.w == nullptr ? 0 : attention.c_out;
    for (int t = 0; t < attention.num_texts; ++t) width += attention.texts[t].n * 2;
    const int64_t work = attention.rows * width * attention.h * attention.d;
    parallel(attention.b * pieces, work, [&](int64_t begin, int64_t end) {
      const auto scratch = scratch_of(kernel.scratch_bytes(attention));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t m = i % pieces * attention.rows;
        const Task task = {i / pieces, m, std::min(m + attention.rows, attention.m)};
        kernel.run(attention, task, scratch.get());
      }
    });
  }
};

Tensor in_type_of(const Tensor& q, const Tensor& x) {
  return x.scalar_type() == q.scalar_type() ? x : x.to(q.scalar_type());
}

// Runs a call whose texts and formula are set, and projects. The weight is plain [c_out c_in] or
// packed [bytes].
Tensor compute(Call& call, const Tensor& q, const OptionalTensor& w_out,
               const OptionalTensor& b_out, int64_t c_out) {
  // Precision was decided by the caller; the projection below must not decide again.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  // Packing weights costs about as much as a hundred rows of their product.
  constexpr int64_t kRowsWorthPacking = 512;
  if (w_out.has_value() && w_out->dim() == 1) {
    call.set_projection(*w_out, b_out, c_out);
  } else if (w_out.has_value() && q.size(0) * q.size(1) >= kRowsWorthPacking &&
             call.kernel.linear_bytes(w_out->size(0), w_out->size(1)) > 0) {
    call.set_projection(pack_weight(*w_out, call.type), b_out, w_out->size(0));
  }
  const Tensor out = call.result(q);
  call.run();
  const Tensor z = in_type_of(q, out);
  const bool done = !w_out.has_value() || call.attention.w != nullptr;
  return done ? z : at::linear(z.flatten(2), *w_out, b_out);
}

Tensor nasa_attention(const Tensor& q, const Tensor& k_pos, const Tensor& v_pos,
                      const Tensor& k_neg, const Tensor& v_neg, const OptionalTensor& w_out,
                      const OptionalTensor& b_out, const OptionalTensor& k_null,
                      const OptionalTensor& v_null, const OptionalTensor& mask_pos,
                      const OptionalTensor& mask_neg, const OptionalTensor& mask_null,
                      const OptionalTensor& strength, double nasa_scale, double softmax_scale) {
  Call call(q, softmax_scale);
  call.add_text(pack(k_pos, v_pos, mask_pos, call.type));
  call.add_text(pack(k_neg, v_neg, mask_neg, call.type));
  if (k_null.has_value() && v_null.has_value()) {
    call.add_text(pack(*k_null, *v_null, mask_null, call.type));
  }
  call.set_strength(strength, nasa_scale);
  return compute(call, q, w_out, b_out, 0);
}

// `kind` and what it needs, as snoopi.ops.guided_attention documents them.
void set_formula(Attention& attention, const std::string& kind, at::ArrayRef<double> parameters) {
  const auto expect = [&](size_t count) {
    TORCH_CHECK(parameters.size() == count, "snoopi: ", kind, " takes ", count, " parameters, got ",
                parameters.size());
  };
  TORCH_CHECK(kind == "nasa" || attention.num_texts == 2, "snoopi: ", kind, " takes no null text");
  if (kind == "nasa") {
    expect(0);
    attention.combine = Combine::kNASA;
  } else if (kind == "vsf") {
    expect(1);
    attention.combine = Combine::kVSF;
    attention.vsf_bias = parameters[0];
  } else if (kind == "nag") {
    expect(3);
    TORCH_CHECK(parameters[2] == 1 || parameters[2] == 2, "snoopi: nag's norm must be 1 or 2, got ",
                parameters[2]);
    attention.combine = Combine::kNAG;
    attention.nag_tau = parameters[0];
    attention.nag_blend = parameters[1];
    attention.nag_norm = static_cast<int>(parameters[2]);
  } else {
    TORCH_CHECK(false, "snoopi: a formula must be nasa, vsf or nag, got ", kind);
  }
}

Tensor guided_attention(const Tensor& q, const Tensor& pos, const Tensor& pos_live, int64_t pos_n,
                        const Tensor& neg, const Tensor& neg_live, int64_t neg_n,
                        const OptionalTensor& null, const OptionalTensor& null_live, int64_t null_n,
                        const OptionalTensor& w_out, const OptionalTensor& b_out, int64_t c_out,
                        const OptionalTensor& strength, double scale, std::string kind,
                        at::ArrayRef<double> parameters, double softmax_scale) {
  Call call(q, softmax_scale);
  call.add_text({pos, pos_live, pos_n});
  call.add_text({neg, neg_live, neg_n});
  if (null.has_value() && null_live.has_value()) call.add_text({*null, *null_live, null_n});
  set_formula(call.attention, kind, parameters);
  call.set_strength(strength, scale);
  return compute(call, q, w_out, b_out, c_out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> twin_attention(const Tensor& q, const Tensor& k_pos,
                                                          const Tensor& v_pos, const Tensor& k_neg,
                                                          const Tensor& v_neg,
                                                          const OptionalTensor& mask_pos,
                                                          const OptionalTensor& mask_neg,
                                                          double softmax_scale) {
  Call call(q, softmax_scale);
  call.add_text(pack(k_pos, v_pos, mask_pos, call.type));
  call.add_text(pack(k_neg, v_neg, mask_neg, call.type));
  call.attention.combine = Combine::kTwin;
  Tensor z[2], lse[2];
  for (int t = 0; t < 2; ++t) {
    z[t] = at::empty(q.sizes(), q.options().dtype(call.type));
    lse[t] = at::empty(q.sizes().slice(0, 3), q.options().dtype(accumulator(call.type)));
    call.attention.out[t] = z[t].mutable_data_ptr();
    call.attention.lse[t] = lse[t].mutable_data_ptr();
  }
  call.run();
  return {in_type_of(q, z[0]), lse[0], in_type_of(q, z[1]), lse[1]};
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     double softmax_scale) {
  Call call(q, softmax_scale);
  call.add_text(pack(k, v, std::nullopt, call.type));
  call.attention.combine = Combine::kTwin;
  const Tensor z = at::empty(q.sizes(), q.options().dtype(call.type));
  const Tensor lse = at::empty(q.sizes().slice(0, 3), q.options().dtype(accumulator(call.type)));
  call.attention.out[0] = z.mutable_data_ptr();
  call.attention.lse[0] = lse.mutable_data_ptr();
  call.run();
  return {in_type_of(q, z), lse};
}

std::tuple<Tensor, Tensor> pack_text(const Tensor& k, const Tensor& v, const OptionalTensor& mask) {
  const Packed packed = pack(k, v, mask, computing_type(k.scalar_type()), true);
  return {packed.data, packed.live};
}

}  // namespace
}  // namespace snoopi

TORCH_LIBRARY_IMPL(snoopi, CPU, m) {
  m.impl("attention", &snoopi::attention);
  m.impl("nasa_attention", &snoopi::nasa_attention);
  m.impl("guided_attention", &snoopi::guided_attention);
  m.impl("twin_attention", &snoopi::twin_attention);
  m.impl("pack_text", &snoopi::pack_text);
}

TORCH_LIBRARY_FRAGMENT(snoopi, m) {
  m.def("cpu_capability() -> str", [] { return snoopi::capability(); });
  // What the library can do, by the newest of its ops: an older one has none, or another number.
  m.def("cpu_version() -> int", []() -> int64_t { return 4; });
  // Bytes of a packed text's head.
  m.def("text_bytes(int n, int d, ScalarType dtype) -> int",
        [](int64_t n, int64_t d, at::ScalarType dtype) {
          return snoopi::kernel_for(snoopi::computing_type(dtype)).text_bytes(n, d);
        });
}
