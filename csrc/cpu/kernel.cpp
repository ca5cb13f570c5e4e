// Cross-attention to one, two or three texts on the CPU, their combination and the projection.
//
// Compiled once per processor capability, SNOOPI_CAPABILITY naming the result; see vec.h on what
// may not be included here. Sums are in fp32 (fp64 for fp64 tensors).
//
// A task is a tile of query rows. Head by head and block by block of kBlockRows rows: the products
// with a text's keys, their exponentials, and the products of those with the values stay in the
// first cache; the combination of the texts goes to the tile's z, all heads wide, and the
// projection follows while z is in the second. Text and weights come packed (see gemm.h), masked
// keys left out, so the loops know no mask.
#include "kernels.h"
#include "project.h"
#include "softmax.h"
#if defined(SNOOPI_AMX)
#include "convolve_tiles.h"
#else
#include "convolve_vectors.h"
#endif

namespace snoopi {
namespace {

// Keys at a time: their products with a block of rows, the exponentials of these, and the keys and
// values themselves pass through the first cache.
#if defined(SNOOPI_AMX)
constexpr int64_t kKeys = 256;
#else
constexpr int64_t kKeys = 512;
#endif

// What a thread works in.
template <typename F>
struct Scratch {
  typename F::Unit* q;              // [block, depth of d]: queries that cannot be used in place
  typename F::Acc* s[kMaxTexts];    // [block, keys at once]: products with the keys
  typename F::Unit* p[kMaxTexts];   // [block, depth of these]: exponentials; s itself where it can
  typename F::Acc* o[kMaxTexts];    // [block, d]: products of the exponentials with the values
  typename F::Acc* max[kMaxTexts];  // [block]: the largest logit, times log2 e
  typename F::Acc* sum[kMaxTexts];  // [block]: of the exponentials
  typename F::Acc* weight[kMaxTexts];  // [block]: what o counts for
  typename F::Acc* factor;             // [block]: what the sums before a run of keys count for
  typename F::Element* z[2];  // [rows, depth of h d]: a task's rows, all heads; NAG: by text
  typename F::Acc* y;         // [block, panel]: projected
  int64_t q_stride, n_stride[kMaxTexts], p_stride[kMaxTexts], o_stride, z_stride;  // in units
};

// Whether a task's rows are kept, all heads wide, for a step after the attention.
inline bool keeps_rows(const Attention& call) {
  return call.w != nullptr || call.combine == Combine::kNAG;
}

// Lays the parts out in `memory`; with null only counts. Returns bytes.
template <typename F>
int64_t lay_out(const Attention& call, char* memory, Scratch<F>* scratch) {
  typedef typename F::Unit Unit;
  int64_t used = 0;
  const auto take = [&]<typename Part>(Part** part, int64_t count) {
    *part = memory == nullptr ? nullptr : reinterpret_cast<Part*>(memory + used);
    used += round_up(count * static_cast<int64_t>(sizeof(Part)), 64);
  };
  scratch->q_stride = depth_units<F>(call.d);
  scratch->o_stride = vectors_of<F>(call.d) * W<F>;
  take(&scratch->q, kBlockRows * scratch->q_stride);
  for (int t = 0; t < call.num_texts; ++t) {
    const int64_t n = call.texts[t].n < kKeys ? call.texts[t].n : kKeys;
    scratch->n_stride[t] = vectors_of<F>(n) * W<F>;
    take(&scratch->s[t], kBlockRows * scratch->n_stride[t]);
    if constexpr (F::kPerUnit == 1) {
      scratch->p_stride[t] = scratch->n_stride[t];
      scratch->p[t] = reinterpret_cast<Unit*>(scratch->s[t]);
    } else {
      scratch->p_stride[t] = depth_units<F>(n);
      take(&scratch->p[t], kBlockRows * scratch->p_stride[t]);
    }
    take(&scratch->o[t], kBlockRows * scratch->o_stride);
    take(&scratch->max[t], kBlockRows + W<F>);
    take(&scratch->sum[t], kBlockRows + W<F>);
    take(&scratch->weight[t], kBlockRows + W<F>);
  }
  take(&scratch->factor, kBlockRows + W<F>);
  scratch->z_stride = 0;
  if (keeps_rows(call)) {
    // A vector more: the last head's last vector may be wider than what is left of the row, and
    // strides of a power of two would crowd few sets of the cache.
    scratch->z_stride = depth_units<F>(call.h * call.d) + 2 * W<F>;
    const int64_t rows = round_up(call.rows, kBlockRows);
    const int num = call.combine == Combine::kNAG ? 2 : 1;
    for (int t = 0; t < num; ++t) {
      take(&scratch->z[t], rows * scratch->z_stride * F::kPerUnit);
    }
    take(&scratch->y, kBlockRows * kPanelColumns<F>);
  }
  return used;
}

// What each text counts for, divided by its softmax's sum. The sums of texts without a live key
// are 1.
template <typename F>
void set_weights(const Attention& call, const typename F::Acc* strength, int64_t rows,
                 const Scratch<F>& scratch) {
  typedef typename F::Acc Acc;
  const bool own = call.combine == Combine::kTwin || call.combine == Combine::kNAG;
  for (int t = 0; t < call.num_texts; ++t) {
    const Acc sign = t == 1 ? -1 : 1;
    const Acc* sum = scratch.sum[t];
    Acc* weight = scratch.weight[t];
    if (t == 0 || own || strength == nullptr) {
      const Acc counts = t == 0 || own ? Acc(1) : sign * static_cast<Acc>(call.scale);
      for (int64_t r = 0; r < kBlockRows; ++r) weight[r] = counts / sum[r];
    } else {
      for (int64_t r = 0; r < rows; ++r) weight[r] = sign * strength[r] / sum[r];
    }
  }
}

// The weights of one softmax over both texts: each text's exponentials are relative to its own
// largest logit, here they become relative to the larger of the two.
template <typename F>
void set_joint_weights(const Attention& call, const typename F::Acc* strength, int64_t rows,
                       const Scratch<F>& scratch) {
  typedef typename F::Acc Acc;
  constexpr int kW = W<F>;
  const Acc lowered = static_cast<Acc>(call.vsf_bias * kLog2E);
  const Acc counts = strength == nullptr ? -static_cast<Acc>(call.scale) : Acc(-1);
  for (int64_t r = 0; r < rows; r += kW) {
    const Vec<Acc> pos = load(scratch.max[0] + r);
    const Vec<Acc> neg = load(scratch.max[1] + r) - splat(lowered);
    const Vec<Acc> largest = greater(pos, neg);
    Vec<Acc> e[2] = {pos - largest, neg - largest};
    exp2_nonpositive<F::kExactExp, 2>(e);
    const Vec<Acc> sum = e[0] * load(scratch.sum[0] + r) + e[1] * load(scratch.sum[1] + r);
    store(scratch.weight[0] + r, e[0] / sum);
    store(scratch.weight[1] + r, splat(counts) * e[1] / sum);
  }
  if (strength == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) scratch.weight[1][r] *= strength[r];
}

template <typename F>
void store_lse(const Attention& call, int64_t b, int64_t m, int64_t h, int64_t rows, int t,
               bool live, const Scratch<F>& scratch) {
  typedef typename F::Acc Acc;
  Acc* lse = static_cast<Acc*>(call.lse[t]) + (b * call.m + m) * call.h + h;
  for (int64_t r = 0; r < rows; ++r) {
    const Acc logit = scratch.max[t][r] + log2_of(scratch.sum[t][r]);
    lse[r * call.h] = live ? static_cast<Acc>(kLn2) * logit : static_cast<Acc>(-__builtin_inf());
  }
}

// Rows of sum over kTexts texts of weight o, d wide. Whole vectors are stored if `room`.
template <typename F, int kTexts, typename To>
void combine_texts(const int* texts, int64_t d, int64_t rows, const Scratch<F>& scratch, To* to,
                   int64_t to_stride, bool room) {
  typedef typename F::Acc Acc;
  constexpr int kW = W<F>;
  const Acc* o[kTexts + 1];
  const Acc* weight[kTexts + 1];
  for (int t = 0; t < kTexts; ++t) o[t] = scratch.o[texts[t]], weight[t] = scratch.weight[texts[t]];
  const int64_t whole = room ? round_up(d, kW) : d / kW * kW;
  for (int64_t r = 0; r < rows; ++r, to += to_stride) {
    const auto sum = [&](int64_t i) {
      Vec<Acc> z = {};
#pragma GCC unroll 3
      for (int t = 0; t < kTexts; ++t) {
        const Vec<Acc> part = load(o[t] + r * scratch.o_stride + i);
        z = t == 0 ? part * splat(weight[t][r]) : z + part * splat(weight[t][r]);
      }
      return z;
    };
    int64_t i = 0;
    for (; i < whole; i += kW) narrow_store(sum(i), to + i);
    if (i < d) narrow_store<Acc>(sum(i), to + i, d - i);
  }
}

// The same for those of the texts [begin, end) that have a live key.
template <typename F, typename To>
void combine(const Attention& call, const bool* live, int begin, int end, int64_t rows,
             const Scratch<F>& scratch, To* to, int64_t to_stride, bool room) {
  int texts[kMaxTexts], count = 0;
  for (int t = begin; t < end; ++t) {
    if (live[t]) texts[count++] = t;
  }
  const auto run = count == 0   ? combine_texts<F, 0, To>
                   : count == 1 ? combine_texts<F, 1, To>
                   : count == 2 ? combine_texts<F, 2, To>
                                : combine_texts<F, 3, To>;
  run(texts, call.d, rows, scratch, to, to_stride, room);
}

// o[r] *= factor[r]
template <typename F>
void shrink_rows(int64_t rows, const typename F::Acc* factor, typename F::Acc* o, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, o += stride) {
    for (int64_t i = 0; i < stride; i += W<F>) store(o + i, load(o + i) * splat(factor[r]));
  }
}

// One block of rows of one head: attention to every text, combined into z or the outputs.
template <typename F>
void attend(const Attention& call, const Task& task, int64_t m, int64_t rows, int64_t h,
            const Scratch<F>& scratch) {
  typedef typename F::T T;
  typedef typename F::Unit Unit;
  typedef typename F::Acc Acc;
  const int64_t b = task.b, d = call.d;
  const T* queries = static_cast<const T*>(call.q) + b * call.q_stride[0] + m * call.q_stride[1] +
                     h * call.q_stride[2];
  const Unit* q = scratch.q;
  int64_t q_stride = scratch.q_stride;
  bool copy = sizeof(T) * F::kPerUnit != sizeof(Unit);
#if defined(SNOOPI_AMX)
  // Tiles read whole rows of 32 elements, 16 at a time.
  copy = depth_units<F>(d) * F::kPerUnit != d || rows % kTileRows != 0;
#endif
  if (F::kPerUnit > 1 && (d % F::kPerUnit != 0 || call.q_stride[1] % F::kPerUnit != 0)) copy = true;
  if (copy) {
    for (int64_t r = 0; r < rows; ++r) {
      fill_units<F>(queries + r * call.q_stride[1], d, scratch.q + r * q_stride, q_stride);
    }
  } else {
    q = reinterpret_cast<const Unit*>(queries);
    q_stride = call.q_stride[1] / F::kPerUnit;
  }
  const auto steps = [](int64_t x) { return (x + F::kPerUnit - 1) / F::kPerUnit; };
  const int64_t units = depth_units<F>(d);
  const bool exact = call.combine == Combine::kTwin;  // the sum is a result, too
  const auto exps = exact ? exponentials<F, true> : exponentials<F, F::kExactExp>;
  bool live[kMaxTexts];
  for (int t = 0; t < call.num_texts; ++t) {
    const PackedText& text = call.texts[t];
    const int64_t n = text.live[b * text.live_stride];
    live[t] = n > 0;
    if (!live[t]) {
      for (int64_t r = 0; r < kBlockRows; ++r) scratch.sum[t][r] = 1;
      continue;
    }
    const char* data = text.data + b * text.batch_stride + h * text.head_stride;
    const Unit* keys = reinterpret_cast<const Unit*>(data);
    const Unit* values = reinterpret_cast<const Unit*>(data + key_bytes<F>(text.n, d));
    for (int64_t i = 0; i < n; i += kKeys) {
      const int64_t count = n - i < kKeys ? n - i : kKeys;
      multiply<F>(q, q_stride, rows, {keys + i * units, units, 0, steps(d), vectors_of<F>(count)},
                  scratch.s[t], scratch.n_stride[t]);
      const bool moved =
          exps(rows, count, call.softmax_scale, i == 0, scratch.s[t], scratch.n_stride[t],
               scratch.p[t], scratch.p_stride[t], scratch.max[t], scratch.sum[t], scratch.factor);
      if (moved) shrink_rows<F>(rows, scratch.factor, scratch.o[t], scratch.o_stride);
      multiply<F>(scratch.p[t], scratch.p_stride[t], rows,
                  {values, depth_units<F>(n), i / F::kPerUnit, steps(count), vectors_of<F>(d)},
                  scratch.o[t], scratch.o_stride, i > 0);
    }
  }
  const Acc* strength = static_cast<const Acc*>(call.strength);
  if (strength != nullptr) strength += b * call.m + m;
  if (call.combine == Combine::kVSF && live[0] && live[1]) {
    set_joint_weights<F>(call, strength, rows, scratch);
  } else {
    set_weights<F>(call, strength, rows, scratch);
  }
  const int64_t row = (b * call.m + m) * call.h * d + h * d, width = call.h * d;
  const int64_t z_stride = scratch.z_stride * F::kPerUnit;
  const int64_t z_row = (m - task.m_begin) * z_stride + h * d;
  switch (call.combine) {
    case Combine::kTwin:
      for (int t = 0; t < call.num_texts; ++t) {
        combine(call, live, t, t + 1, rows, scratch, static_cast<T*>(call.out[t]) + row, width,
                false);
        store_lse<F>(call, b, m, h, rows, t, live[t], scratch);
      }
      return;
    case Combine::kNAG:
      for (int t = 0; t < 2; ++t) {
        combine(call, live, t, t + 1, rows, scratch, scratch.z[t] + z_row, z_stride, true);
      }
      return;
    default:
      if (call.w == nullptr) {
        combine(call, live, 0, call.num_texts, rows, scratch, static_cast<T*>(call.out[0]) + row,
                width, false);
      } else {
        combine(call, live, 0, call.num_texts, rows, scratch, scratch.z[0] + z_row, z_stride, true);
      }
  }
}

// NAG of a task's rows, from both texts' attentions to the first's place, or to the output.
template <typename F>
void normalize(const Attention& call, const Task& task, const Scratch<F>& scratch) {
  typedef typename F::T T;
  typedef typename F::Acc Acc;
  constexpr int kW = W<F>;
  const int64_t c = call.h * call.d, z_stride = scratch.z_stride * F::kPerUnit;
  const PackedText& negative = call.texts[1];
  const bool live = negative.live[task.b * negative.live_stride] > 0;
  const Acc tau = static_cast<Acc>(call.nag_tau), blend = static_cast<Acc>(call.nag_blend);
  for (int64_t m = task.m_begin; m < task.m_end; ++m) {
    typename F::Element* pos = scratch.z[0] + (m - task.m_begin) * z_stride;
    const typename F::Element* neg = scratch.z[1] + (m - task.m_begin) * z_stride;
    const Acc a = call.strength == nullptr
                      ? static_cast<Acc>(call.scale)
                      : static_cast<const Acc*>(call.strength)[task.b * call.m + m];
    // z+ and z; lanes past the row's end are zero.
    const auto both = [&](int64_t i, Vec<Acc>* z) {
      const Vec<Acc> x = widen_load(pos + i), away = x - widen_load(neg + i);
      z[0] = first_lanes<Acc>(c - i, x, Vec<Acc>{});
      z[1] = first_lanes<Acc>(c - i, x + splat(a) * away, Vec<Acc>{});
    };
    Vec<Acc> sums[2] = {}, z[2];
    for (int64_t i = 0; i < c; i += kW) {
      both(i, z);
      for (int t = 0; t < 2; ++t) {
        sums[t] += call.nag_norm == 2 ? z[t] * z[t] : greater(z[t], -z[t]);
      }
    }
    Acc norm[2] = {};
    for (int t = 0; t < 2; ++t) {
      for (int lane = 0; lane < kW; ++lane) norm[t] += sums[t][lane];
      if (call.nag_norm == 2) norm[t] = square_root(norm[t]);
    }
    const Acc shrink = norm[1] > tau * norm[0] ? tau * norm[0] / norm[1] : Acc(1);
    const Acc of_z = live ? blend * shrink : Acc(0), of_pos = live ? 1 - blend : Acc(1);
    for (int64_t i = 0; i < c; i += kW) {
      both(i, z);
      const Vec<Acc> mixed = live ? splat(of_z) * z[1] + splat(of_pos) * z[0] : z[0];
      if (call.w == nullptr) {
        T* out = static_cast<T*>(call.out[0]) + (task.b * call.m + m) * c;
        narrow_store<Acc>(mixed, out + i, c - i);
      } else {
        narrow_store<Acc>(mixed, pos + i, c - i);
      }
    }
  }
}

// out = z w^T + bias for a task's rows.
template <typename F>
void project(const Attention& call, const Task& task, const Scratch<F>& scratch) {
  typedef typename F::T T;
  T* out = static_cast<T*>(call.out[0]) + (task.b * call.m + task.m_begin) * call.c_out;
  const Projection<F> to = {
      static_cast<const typename F::Unit*>(call.w),
      call.h * call.d,
      call.c_out,
      static_cast<const typename F::Acc*>(call.bias),
      nullptr,
      out,
      false,
  };
  project_rows<F>(reinterpret_cast<const typename F::Unit*>(scratch.z[0]), scratch.z_stride,
                  task.m_end - task.m_begin, 0, call.c_out, to, scratch.y);
}

template <typename F>
void run(const Attention& call, const Task& task, void* memory) {
#if defined(SNOOPI_AMX)
  const Tiles tiles;
#endif
  Scratch<F> scratch = {};
  lay_out(call, static_cast<char*>(memory), &scratch);
  for (int64_t h = 0; h < call.h; ++h) {
    for (int64_t m = task.m_begin; m < task.m_end; m += kBlockRows) {
      const int64_t rows = task.m_end - m < kBlockRows ? task.m_end - m : kBlockRows;
      attend(call, task, m, rows, h, scratch);
    }
  }
  if (call.combine == Combine::kNAG) normalize(call, task, scratch);
  if (call.w == nullptr) return;
  if constexpr (F::kPerUnit > 1) {  // what the depth of z is padded with
    const int64_t stride = scratch.z_stride * F::kPerUnit, c = call.h * call.d;
    const int64_t padded = depth_units<F>(c) * F::kPerUnit;
    for (int64_t r = 0; r < task.m_end - task.m_begin; ++r) {
      for (int64_t i = c; i < padded; ++i) scratch.z[0][r * stride + i] = {};
    }
  }
  project(call, task, scratch);
}

template <typename F>
int64_t scratch_bytes(const Attention& call) {
  Scratch<F> scratch = {};
  return lay_out(call, nullptr, &scratch);
}

#if defined(SNOOPI_AMX)
// A product of small whole numbers, which must come out exactly. A hypervisor may announce AMX and
// not keep its registers; better no AMX then than wrong pictures.
bool tiles_work() {
  constexpr int64_t kRows = 32, kDepth = 32, kColumns = 32;  // depth in units
  static uint32_t a[kRows * kDepth], b[kDepth * kColumns];
  static float c[kRows * kColumns];
  const auto pair = [](int low, int high) {
    const auto bf16 = [](int x) {
      const float y = static_cast<float>(x);
      uint32_t bits;
      __builtin_memcpy(&bits, &y, sizeof(bits));
      return bits >> 16;
    };
    return bf16(low) | bf16(high) << 16;
  };
  for (int i = 0; i < kRows * kDepth; ++i) a[i] = pair(i % 7 - 3, i % 5 - 2);
  for (int i = 0; i < kDepth * kColumns; ++i) b[i] = pair(i % 3 - 1, i % 11 - 5);
  {
    const Tiles tiles;
    multiply_tiles(a, kDepth, kRows, b, kDepth, 0, kDepth, 2, c, kColumns, false);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kColumns; ++j) {
      int sum = 0;
      for (int k = 0; k < kDepth; ++k) {
        const int x = r * kDepth + k, y = k * kColumns + j;
        sum += (x % 7 - 3) * (y % 3 - 1) + (x % 5 - 2) * (y % 11 - 5);
      }
      if (c[r * kColumns + j] != static_cast<float>(sum)) return false;
    }
  }
  return true;
}
constexpr bool (*kWorks)() = tiles_work;
#else
constexpr bool (*kWorks)() = nullptr;
#endif

// z of these rows should stay in the second cache: 1 MiB, or 2 where there is AMX.
constexpr int64_t kMostRows = kBlockRows == 32 ? 256 : 128;

template <typename F>
constexpr Kernel kernel() {
  return {
      .text_bytes = text_bytes<F>,
      .pack_text = pack_text<F>,
      .linear_bytes = linear_bytes<F>,
      .pack_linear = pack_linear<F>,
      .linear_columns = kPanelColumns<F>,
      .most_rows = kMostRows,
      .scratch_bytes = scratch_bytes<F>,
      .run = run<F>,
      .linear_rows = linear_rows<F>,
      .linear_scratch = linear_scratch<F>,
      .run_linear = run_linear<F>,
      .vector = W<F>,
      .block_rows = kBlockRows,
      .convolves = convolves<F>,
      .conv_kind = conv_kind<F>,
      .conv_columns = conv_columns<F>,
      .conv_tiles = conv_tiles<F>,
      .conv_bytes = conv_bytes<F>,
      .run_conv = run_conv<F>,
      .add_moments = add_moments<F>,
      .works = kWorks,
  };
}

}  // namespace

#define SNOOPI_JOIN(a, b) a##b
#define SNOOPI_NAME(capability) SNOOPI_JOIN(kernels_, capability)
#if defined(SNOOPI_PAIRED)
const Kernels SNOOPI_NAME(SNOOPI_CAPABILITY) = {{}, kernel<Paired>(), {}};
#else
const Kernels SNOOPI_NAME(SNOOPI_CAPABILITY) = {kernel<Plain<float> >(), kernel<Widened>(),
                                                kernel<Plain<double> >()};
#endif

}  // namespace snoopi
