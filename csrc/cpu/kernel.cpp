// Cross-attention to one, two or three texts on the CPU, their combination and the projection.
//
// Compiled once per processor capability, SNOOPI_CAPABILITY naming the result; see vec.h on what
// may not be included here. Sums are in fp32 (fp64 for fp64 tensors).
//
// A task is a tile of query rows. Head by head and block by block of kBlockRows rows: the products
// with a text's keys, their exponentials, and the products of those with the values stay in the
// first cache; the combination of the texts goes to the tile's z, all heads wide, and the projection
// follows while z is in the second. Text and weights come packed (see gemm.h), masked keys left out,
// so the loops know no mask.
#include "attention.h"
#include "gemm.h"

namespace snoopi {
namespace {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

template <typename F>
constexpr int W = kWidth<typename F::Acc>;

template <typename F>
inline int64_t vectors_of(int64_t columns) {
  return (columns + W<F> - 1) / W<F>;
}

// Units of a packed matrix: `columns` columns, each `depth` elements deep.
template <typename F>
inline int64_t packed_units(int64_t columns, int64_t depth) {
  return vectors_of<F>(columns) * W<F> * depth_units<F>(depth);
}

// Where vector `v` of a packed matrix begins, and the stride of its steps.
template <typename Unit>
struct Place {
  Unit* at;
  int64_t step;
};

template <typename F>
inline Place<typename F::Unit> place(typename F::Unit* packed, int64_t v, int64_t vectors,
                                     int64_t units) {
  const int64_t panel = v / kPanelVectors * kPanelVectors;
  const int64_t width = vectors - panel < kPanelVectors ? vectors - panel : kPanelVectors;
  return {packed + panel * W<F> * units + (v - panel) * W<F>, width * W<F>};
}

// Row i of a matrix: row live[i], or i itself without `live`, of the tensor.
template <typename T>
inline const T* row_at(const T* rows, int64_t stride, const int32_t* live, int64_t i) {
  return rows + (live == nullptr ? i : live[i]) * stride;
}

// Vectors [v_begin, v_end) of the packed transposed matrix: its rows become columns. For keys and
// weights, whose rows lie along the depth.
template <typename F>
void pack_rows(const typename F::T* rows, int64_t stride, const int32_t* live, int64_t num_rows,
               int64_t depth, int64_t v_begin, int64_t v_end, typename F::Unit* packed) {
  typedef typename F::Unit Unit;
  typedef typename F::Acc Acc;  // of a unit's size: a transposition only moves bits
  static_assert(sizeof(Unit) == sizeof(Acc));
  constexpr int kW = W<F>;
  const int64_t units = depth_units<F>(depth), vectors = vectors_of<F>(num_rows);
  alignas(64) Unit square[kW * kW], turned[kW * kW];
  for (int64_t v = v_begin; v < v_end; ++v) {
    const Place<Unit> to = place<F>(packed, v, vectors, units);
    for (int64_t k = 0; k < units; k += kW) {
      const int64_t first = k * F::kPerUnit;
      for (int64_t r = 0; r < kW; ++r) {
        const int64_t i = v * kW + r;
        const int64_t left = i < num_rows && first < depth ? depth - first : 0;
        const typename F::T* row = row_at(rows, stride, live, i < num_rows ? i : 0);
        fill_units<F>(row + (left > 0 ? first : 0), left, square + r * kW, kW);
      }
      transpose_square(reinterpret_cast<const Acc*>(square), kW, reinterpret_cast<Acc*>(turned),
                       kW);
      const int64_t steps = units - k < kW ? units - k : kW;
      for (int64_t i = 0; i < steps; ++i) {
        __builtin_memcpy(to.at + (k + i) * to.step, turned + i * kW, kW * sizeof(Unit));
      }
    }
  }
}

// The packed matrix of values: its rows are the steps of depth.
template <typename F>
void pack_values(const typename F::T* rows, int64_t stride, const int32_t* live, int64_t num_rows,
                 int64_t columns, typename F::Unit* packed) {
  typedef typename F::Unit Unit;
  constexpr int kW = W<F>;
  const int64_t units = depth_units<F>(num_rows), vectors = vectors_of<F>(columns);
  for (int64_t v = 0; v < vectors; ++v) {
    const Place<Unit> to = place<F>(packed, v, vectors, units);
    const int64_t filled = columns - v * kW < kW ? columns - v * kW : kW;
    for (int64_t k = 0; k < units; ++k) {
      Unit* step = to.at + k * to.step;
      const int64_t i = k * F::kPerUnit;
      const int64_t count = i < num_rows ? filled : 0;
      const typename F::T* row = row_at(rows, stride, live, i < num_rows ? i : 0) + v * kW;
      if constexpr (F::kPerUnit == 1) {
        fill_units<F>(row, count, step, kW);
      } else {
        const bool pair = i + 1 < num_rows;
        const typename F::T* next = pair ? row_at(rows, stride, live, i + 1) + v * kW : row;
        for (int64_t j = 0; j < kW; ++j) {
          const uint32_t low = j < count ? row[j].bits : 0;
          const uint32_t high = pair && j < count ? next[j].bits : 0;
          step[j] = low | high << 16;
        }
      }
    }
  }
}

template <typename F>
int64_t key_bytes(int64_t n, int64_t d) {
  return round_up(packed_units<F>(n, d) * static_cast<int64_t>(sizeof(typename F::Unit)), 64);
}

template <typename F>
int64_t text_bytes(int64_t n, int64_t d) {
  const int64_t values = packed_units<F>(d, n) * static_cast<int64_t>(sizeof(typename F::Unit));
  return key_bytes<F>(n, d) + round_up(values, 64);
}

template <typename F>
void pack_text(const Text& text, int64_t b, int64_t h, const int32_t* live, int64_t num_live,
               void* to) {
  typedef typename F::T T;
  typedef typename F::Unit Unit;
  const T* k = static_cast<const T*>(text.k) + b * text.k_stride[0] + h * text.k_stride[2];
  const T* v = static_cast<const T*>(text.v) + b * text.v_stride[0] + h * text.v_stride[2];
  char* values = static_cast<char*>(to) + key_bytes<F>(text.n, text.d);
  pack_rows<F>(k, text.k_stride[1], live, num_live, text.d, 0, vectors_of<F>(num_live),
               static_cast<Unit*>(to));
  pack_values<F>(v, text.v_stride[1], live, num_live, text.d, reinterpret_cast<Unit*>(values));
}

template <typename F>
int64_t linear_bytes(int64_t c_out, int64_t c_in) {
  return packed_units<F>(c_out, c_in) * static_cast<int64_t>(sizeof(typename F::Unit));
}

template <typename F>
void pack_linear(const void* w, int64_t stride, int64_t c_out, int64_t c_in, int64_t begin,
                 int64_t end, void* to) {
  pack_rows<F>(static_cast<const typename F::T*>(w), stride, nullptr, c_out, c_in, begin / W<F>,
               vectors_of<F>(end), static_cast<typename F::Unit*>(to));
}

// What a thread works in.
template <typename F>
struct Scratch {
  typename F::Unit* q;               // [block, depth of d]: queries that cannot be used in place
  typename F::Acc* s[kMaxTexts];     // [block, n]: products with the keys
  typename F::Unit* p[kMaxTexts];    // [block, depth of n]: exponentials; s itself where it can be
  typename F::Acc* o[kMaxTexts];     // [block, d]: products of the exponentials with the values
  typename F::Acc* max[kMaxTexts];   // [block]: the largest logit, times log2 e
  typename F::Acc* sum[kMaxTexts];   // [block]: of the exponentials
  typename F::Acc* weight[kMaxTexts];  // [block]: what o counts for
  typename F::Element* z;            // [rows, depth of h d]: all heads of a task's rows
  typename F::Acc* y;                // [block, panel]: projected
  int64_t q_stride, n_stride[kMaxTexts], p_stride[kMaxTexts], o_stride, z_stride;  // in units
};

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
    const int64_t n = call.texts[t].n;
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
    take(&scratch->weight[t], kBlockRows);
  }
  scratch->z_stride = 0;
  if (call.w != nullptr) {
    // A vector more: the last head's last vector may be wider than what is left of the row, and
    // strides of a power of two would crowd few sets of the cache.
    scratch->z_stride = depth_units<F>(call.h * call.d) + 2 * W<F>;
    const int64_t rows = round_up(call.rows, kBlockRows);
    take(&scratch->z, rows * scratch->z_stride * F::kPerUnit);
    take(&scratch->y, kBlockRows * kPanelColumns<F>);
  }
  return used;
}

// exp(scale (s - max)) of one text's products and its sum, by row. The exponent is one multiply-add
// from the products: rounding the row's shift does not matter, because every element has the same.
template <typename F, bool kExact>
void exponentials(int64_t rows, int64_t n, double softmax_scale, typename F::Acc* s,
                  int64_t s_stride, typename F::Unit* p_units, int64_t p_stride,
                  typename F::Acc* max, typename F::Acc* sum) {
  typedef typename F::Acc Acc;
  typedef typename F::Element Element;
  constexpr int kW = W<F>;
  constexpr int kGroup = kW < 3 ? 2 : kBlockRows % 4 == 0 ? 4 : 3;  // rows at a time
  constexpr int64_t kLanes = kW / kGroup * kGroup;  // rows that share a vector of maxima
  static_assert(kBlockRows % kGroup == 0 && kGroup <= kW);
  const int64_t last = vectors_of<F>(n) - 1, tail = n - last * kW;
  const Acc scale = static_cast<Acc>(__builtin_fabs(softmax_scale) * kLog2E);
  const Vec<Acc> lowest = splat(static_cast<Acc>(-__builtin_inf()));
  if (softmax_scale < 0) {  // so that the largest product is the largest logit
    for (int64_t i = 0; i < rows * s_stride; ++i) s[i] = -s[i];
  }
  // A last group may take rows past the block's last: there is room, and nobody reads the result.
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t end = rows < first + kLanes ? rows : first + kLanes;
    Vec<Acc> by_row[kW] = {};
    for (int64_t r = first; r < end; r += kGroup) {
      const Acc* row = s + r * s_stride;
      Vec<Acc> largest[kGroup];
#pragma GCC unroll 4
      for (int i = 0; i < kGroup; ++i) {
        largest[i] = first_lanes<Acc>(tail, load(row + i * s_stride + last * kW), lowest);
      }
      for (int64_t v = 0; v < last; ++v) {
#pragma GCC unroll 4
        for (int i = 0; i < kGroup; ++i) {
          largest[i] = greater(load(row + i * s_stride + v * kW), largest[i]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kGroup; ++i) by_row[r - first + i] = largest[i];
    }
    const auto larger = [](Vec<Acc> a, Vec<Acc> b) { return greater(a, b); };
    store(max + first, splat(scale) * fold_rows<Acc>(by_row, larger));
    for (int64_t r = first; r < end; r += kGroup) {
      const Acc* row = s + r * s_stride;
      Element* p = reinterpret_cast<Element*>(p_units + r * p_stride);
      Vec<Acc> shift[kGroup], total[kGroup] = {};
#pragma GCC unroll 4
      for (int i = 0; i < kGroup; ++i) shift[i] = splat(max[r + i]);
      for (int64_t v = 0; v <= last; ++v) {
        Vec<Acc> x[kGroup];
#pragma GCC unroll 4
        for (int i = 0; i < kGroup; ++i) {
          x[i] = load(row + i * s_stride + v * kW) * splat(scale) - shift[i];
        }
        exp2_nonpositive<kExact, kGroup>(x);
        if (v == last) {
#pragma GCC unroll 4
          for (int i = 0; i < kGroup; ++i) x[i] = first_lanes<Acc>(tail, x[i], Vec<Acc>{});
        }
#pragma GCC unroll 4
        for (int i = 0; i < kGroup; ++i) {
          narrow_store(x[i], p + i * p_stride * F::kPerUnit + v * kW);
          total[i] += x[i];
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kGroup; ++i) {
        by_row[r - first + i] = total[i];
        if (F::kPerUnit > 1 && last % 2 == 0) {  // the depth is a whole number of pairs of vectors
          narrow_store(Vec<Acc>{}, p + i * p_stride * F::kPerUnit + (last + 1) * kW);
        }
      }
    }
    store(sum + first,
          fold_rows<Acc>(by_row, [](Vec<Acc> a, Vec<Acc> b) { return a + b; }));
  }
}

// What each text counts for, divided by its softmax's sum.
template <typename F>
void set_weights(const Attention& call, int64_t b, int64_t m, int64_t rows,
                 const Scratch<F>& scratch) {
  typedef typename F::Acc Acc;
  const Acc* strength = static_cast<const Acc*>(call.strength);
  if (strength != nullptr) strength += b * call.m + m;
  for (int t = 0; t < call.num_texts; ++t) {
    const bool own = t == 0 || call.combine == Combine::kTwin;
    const Acc sign = t == 1 ? -1 : 1;
    const Acc* sum = scratch.sum[t];
    Acc* weight = scratch.weight[t];
    if (own || strength == nullptr) {
      const Acc counts = own ? Acc(1) : sign * static_cast<Acc>(call.nasa_scale);
      for (int64_t r = 0; r < kBlockRows; ++r) weight[r] = counts / sum[r];
    } else {
      for (int64_t r = 0; r < rows; ++r) weight[r] = sign * strength[r] / sum[r];
    }
  }
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

// Rows of sum over the texts [begin, end) of weight o, d wide. Whole vectors are stored if `room`.
template <typename F, typename To>
void combine(const Attention& call, const bool* live, int begin, int end, int64_t rows,
             const Scratch<F>& scratch, To* to, int64_t to_stride, bool room) {
  typedef typename F::Acc Acc;
  constexpr int kW = W<F>;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < call.d; i += kW) {
      Vec<Acc> z = {};
      for (int t = begin; t < end; ++t) {
        if (!live[t]) continue;
        const Vec<Acc> o = load(scratch.o[t] + r * scratch.o_stride + i);
        // The first text starts the sum: adding to zero would turn -0 to 0 and cost an operation.
        z = t == begin ? o * splat(scratch.weight[t][r]) : z + o * splat(scratch.weight[t][r]);
      }
      narrow_store<Acc>(z, to + r * to_stride + i, room ? kW : call.d - i);
    }
  }
}

// One block of rows of one head: attention to every text, combined into z or the outputs.
template <typename F>
void attend(const Attention& call, const Task& task, int64_t m, int64_t rows, int64_t h,
            const Scratch<F>& scratch) {
  typedef typename F::T T;
  typedef typename F::Unit Unit;
  const int64_t b = task.b, d = call.d;
  const T* queries = static_cast<const T*>(call.q) + b * call.q_stride[0] + m * call.q_stride[1] +
                     h * call.q_stride[2];
  const Unit* q = scratch.q;
  int64_t q_stride = scratch.q_stride;
  bool copy = sizeof(T) * F::kPerUnit != sizeof(Unit);
#if defined(SNOOPI_AMX)
  copy = true;  // tiles read the padding
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
  const bool exact = call.combine == Combine::kTwin;  // the sum is a result, too
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
    multiply<F>(q, q_stride, rows, keys, depth_units<F>(d), steps(d), vectors_of<F>(n),
                scratch.s[t], scratch.n_stride[t]);
    const auto exps = exact ? exponentials<F, true> : exponentials<F, F::kExactExp>;
    exps(rows, n, call.softmax_scale, scratch.s[t], scratch.n_stride[t], scratch.p[t],
         scratch.p_stride[t], scratch.max[t], scratch.sum[t]);
    multiply<F>(scratch.p[t], scratch.p_stride[t], rows, values, depth_units<F>(n), steps(n),
                vectors_of<F>(d), scratch.o[t], scratch.o_stride);
  }
  set_weights<F>(call, b, m, rows, scratch);
  const int64_t row = (b * call.m + m) * call.h * d + h * d, width = call.h * d;
  if (call.combine == Combine::kTwin) {
    for (int t = 0; t < call.num_texts; ++t) {
      combine(call, live, t, t + 1, rows, scratch, static_cast<T*>(call.out[t]) + row, width, false);
      store_lse<F>(call, b, m, h, rows, t, live[t], scratch);
    }
  } else if (call.w == nullptr) {
    combine(call, live, 0, call.num_texts, rows, scratch, static_cast<T*>(call.out[0]) + row, width,
            false);
  } else {
    const int64_t stride = scratch.z_stride * F::kPerUnit;
    combine(call, live, 0, call.num_texts, rows, scratch,
            scratch.z + (m - task.m_begin) * stride + h * d, stride, true);
  }
}

// out = z w^T + bias for a task's rows, panel by panel of the weights.
template <typename F>
void project(const Attention& call, const Task& task, const Scratch<F>& scratch) {
  typedef typename F::T T;
  typedef typename F::Unit Unit;
  typedef typename F::Acc Acc;
  constexpr int kW = W<F>;
  constexpr int64_t kColumns = kPanelColumns<F>;
  const int64_t c_in = call.h * call.d, units = depth_units<F>(c_in);
  const int64_t steps = (c_in + F::kPerUnit - 1) / F::kPerUnit;
  const T* bias = static_cast<const T*>(call.bias);
  T* out = static_cast<T*>(call.out[0]) + (task.b * call.m + task.m_begin) * call.c_out;
  const int64_t rows = task.m_end - task.m_begin;
  for (int64_t j = 0; j < call.c_out; j += kColumns) {
    const int64_t columns = call.c_out - j < kColumns ? call.c_out - j : kColumns;
    alignas(64) Acc added[kColumns] = {};
    for (int64_t i = 0; bias != nullptr && i < columns; ++i) added[i] = widen(bias[j + i]);
    const Unit* w = static_cast<const Unit*>(call.w) + j * units;
    for (int64_t r = 0; r < rows; r += kBlockRows) {
      const int64_t count = rows - r < kBlockRows ? rows - r : kBlockRows;
      const Unit* z = reinterpret_cast<const Unit*>(scratch.z) + r * scratch.z_stride;
      multiply<F>(z, scratch.z_stride, count, w, units, steps, vectors_of<F>(columns), scratch.y,
                  kColumns);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t v = 0; v < columns; v += kW) {
          const Vec<Acc> y = load(scratch.y + i * kColumns + v) + load(added + v);
          narrow_store<Acc>(y, out + (r + i) * call.c_out + j + v, columns - v);
        }
      }
    }
  }
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
  if (call.w == nullptr) return;
  if constexpr (F::kPerUnit > 1) {  // what the depth of z is padded with
    const int64_t stride = scratch.z_stride * F::kPerUnit, c = call.h * call.d;
    const int64_t padded = depth_units<F>(c) * F::kPerUnit;
    for (int64_t r = 0; r < task.m_end - task.m_begin; ++r) {
      for (int64_t i = c; i < padded; ++i) scratch.z[r * stride + i] = {};
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
    multiply_tiles(a, kDepth, kRows, b, kDepth, 2, c, kColumns);
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

template <typename F>
constexpr Kernel kernel() {
  return {text_bytes<F>,    pack_text<F>, linear_bytes<F>, pack_linear<F>, kPanelColumns<F>,
          scratch_bytes<F>, run<F>,       kWorks};
}

}  // namespace

#define SNOOPI_JOIN(a, b) a##b
#define SNOOPI_NAME(capability) SNOOPI_JOIN(kernels_, capability)
#if defined(SNOOPI_PAIRED)
const Kernels SNOOPI_NAME(SNOOPI_CAPABILITY) = {{}, kernel<Paired>(), {}};
#else
const Kernels SNOOPI_NAME(SNOOPI_CAPABILITY) = {kernel<Plain<float>>(), kernel<Widened>(),
                                                kernel<Plain<double>>()};
#endif

}  // namespace snoopi
