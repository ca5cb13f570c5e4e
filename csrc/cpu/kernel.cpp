// Cross-attention to one, two or three texts on the CPU, and their NASA combination.
//
// Compiled once per processor capability, SNOOPI_CAPABILITY naming the result; see vec.h on what
// may not be included here. Everything is computed in fp32 (fp64 for fp64 tensors).
//
// Query rows lie along the vector lanes: a tile holds kTileRows of them, transposed. Then softmax
// needs no reduction across lanes, neither n nor d is padded, and both products are the same small
// product: a column of vectors times a broadcast scalar. Masked keys are dropped when keys and
// values are packed, which costs nothing there and leaves no masking in the loops.
#include "attention.h"
#include "vec.h"

namespace snoopi {
namespace {

struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct AccOf {
  typedef T Type;
};
template <>
struct AccOf<BFloat16> {
  typedef float Type;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof(y));
  return y;
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, BFloat16* to) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxBlock = 12;  // of 32 registers 2 * 12 accumulate
#else
constexpr int kMaxBlock = 6;  // of 16 registers 2 * 6 accumulate
#endif
constexpr int kTileVectors = 2;
template <typename Acc>
constexpr int64_t kTileRows = kTileVectors * kWidth<Acc>;

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A sum is cut into blocks of nearly equal size, at most kMaxBlock.
inline int64_t block_size(int64_t total) {
  const int64_t num = (total + kMaxBlock - 1) / kMaxBlock;
  return (total + num - 1) / num;
}

// Where a thread keeps its tile and the packed keys and values of one head.
template <typename Acc>
struct Scratch {
  Acc* rows;             // [tile, d rounded up to a vector]: a tile as it lies in memory
  Acc* q;                // [d rounded up, tile]: transposed
  Acc* z;                // [d rounded up, tile]: transposed
  Acc* p;                // [n, tile]: products with the keys, then exponentials
  Acc* max;              // [tile]
  Acc* sum;              // [tile]
  Acc* weight;           // [tile]
  Acc* k[kMaxTexts];     // blocks of keys, each [d, block]
  Acc* v[kMaxTexts];     // [n, d]
  int64_t n[kMaxTexts];  // live keys
  int64_t d_padded;
};

// Lays the parts out in `memory`; with null only counts. Returns bytes.
template <typename Acc>
int64_t lay_out(const Attention& call, char* memory, Scratch<Acc>* scratch) {
  int64_t used = 0, n_max = 0;
  const auto take = [&](int64_t count) {
    Acc* part = memory == nullptr ? nullptr : reinterpret_cast<Acc*>(memory + used);
    used += round_up(count * static_cast<int64_t>(sizeof(Acc)), 64);
    return part;
  };
  constexpr int64_t kTile = kTileRows<Acc>;
  scratch->d_padded = round_up(call.d, kWidth<Acc>);
  scratch->rows = take(kTile * scratch->d_padded);
  scratch->q = take(kTile * scratch->d_padded);
  scratch->z = take(kTile * scratch->d_padded);
  scratch->max = take(kTile);
  scratch->sum = take(kTile);
  scratch->weight = take(kTile);
  for (int t = 0; t < call.num_texts; ++t) {
    const int64_t n = call.texts[t].n;
    n_max = n > n_max ? n : n_max;
    scratch->k[t] = take(n * call.d);
    scratch->v[t] = take(n * call.d);
  }
  scratch->p = take(n_max * kTile);
  return used;
}

// Copies the live keys and values of one head. With a negative softmax scale the keys are negated,
// so that the largest product is the largest logit.
template <typename T, typename Acc>
void pack_text(const Attention& call, const Task& task, int t, Scratch<Acc>* scratch) {
  const Text& text = call.texts[t];
  const T* k =
      static_cast<const T*>(text.k) + task.b * text.k_stride[0] + task.h * text.k_stride[2];
  const T* v =
      static_cast<const T*>(text.v) + task.b * text.v_stride[0] + task.h * text.v_stride[2];
  const bool* mask = text.mask == nullptr ? nullptr : text.mask + task.b * text.mask_stride;
  int64_t live = text.n;
  if (mask != nullptr) {
    live = 0;
    for (int64_t j = 0; j < text.n; ++j) live += mask[j];
  }
  scratch->n[t] = live;
  if (live == 0) return;

  const int64_t d = call.d, block = block_size(live);
  const Acc sign = call.softmax_scale < 0 ? -1 : 1;
  int64_t at = 0;
  for (int64_t j = 0; j < text.n; ++j) {
    if (mask != nullptr && !mask[j]) continue;
    const int64_t first = at / block * block;
    const int64_t width = live - first < block ? live - first : block;
    const T* k_row = k + j * text.k_stride[1];
    const T* v_row = v + j * text.v_stride[1];
    Acc* k_to = scratch->k[t] + first * d + (at - first);
    Acc* v_to = scratch->v[t] + at * d;
    for (int64_t i = 0; i < d; ++i) k_to[i * width] = sign * widen(k_row[i]);
    for (int64_t i = 0; i < d; ++i) v_to[i] = widen(v_row[i]);
    ++at;
  }
}

// kMax: stores x and keeps the running maximum. kFirst, kMore: z = weight x, z += weight x.
enum class After { kMax, kFirst, kMore };

// x[j][rows] = sum over i of b[i][j] a[i][rows], for kBlock columns j and kVectors vectors of rows.
// Every element is one chain of multiply-adds over i, so it does not depend on the blocking.
template <typename Acc, After kAfter, int kVectors, int kBlock>
void product(const Acc* a, const Acc* b, int64_t b_stride, int64_t depth, Acc* to, Acc* by_row) {
  constexpr int W = kWidth<Acc>;
  constexpr int64_t kTile = kTileRows<Acc>;
  Vec<Acc> x[kBlock][kVectors] = {};
  for (int64_t i = 0; i < depth; ++i) {
    Vec<Acc> rows[kVectors];
#pragma GCC unroll 2
    for (int r = 0; r < kVectors; ++r) rows[r] = load(a + i * kTile + r * W);
#pragma GCC unroll 12
    for (int j = 0; j < kBlock; ++j) {
      const Vec<Acc> column = splat(b[i * b_stride + j]);
#pragma GCC unroll 2
      for (int r = 0; r < kVectors; ++r) x[j][r] += column * rows[r];
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kVectors; ++r) {
    Vec<Acc> row = load(by_row + r * W);
#pragma GCC unroll 12
    for (int j = 0; j < kBlock; ++j) {
      Acc* z = to + j * kTile + r * W;
      if constexpr (kAfter == After::kMax) {
        row = greater(x[j][r], row);
        store(z, x[j][r]);
      } else if constexpr (kAfter == After::kFirst) {
        store(z, row * x[j][r]);
      } else {
        store(z, load(z) + row * x[j][r]);
      }
    }
    if constexpr (kAfter == After::kMax) store(by_row + r * W, row);
  }
}

// `product` for a block size known only now.
template <typename Acc, After kAfter, int kVectors, int kBlock = kMaxBlock>
void product_of(int64_t block, const Acc* a, const Acc* b, int64_t b_stride, int64_t depth, Acc* to,
                Acc* by_row) {
  if (block == kBlock) {
    product<Acc, kAfter, kVectors, kBlock>(a, b, b_stride, depth, to, by_row);
  } else if constexpr (kBlock > 1) {
    product_of<Acc, kAfter, kVectors, kBlock - 1>(block, a, b, b_stride, depth, to, by_row);
  }
}

// Products of a tile with one text's keys, then exp(scale (product - max)) and its sum. Scaling
// after the subtraction keeps the error of large logits that of the product alone.
template <typename Acc, int kVectors>
void exponentials(const Attention& call, const Scratch<Acc>& scratch, int t) {
  constexpr int W = kWidth<Acc>;
  constexpr int64_t kTile = kTileRows<Acc>;
  const int64_t n = scratch.n[t], d = call.d, block = block_size(n);
  const Acc scale = static_cast<Acc>(__builtin_fabs(call.softmax_scale) * kLog2E);
  for (int r = 0; r < kVectors; ++r) {
    store(scratch.max + r * W, splat(static_cast<Acc>(-__builtin_inf())));
  }
  for (int64_t first = 0; first < n; first += block) {
    const int64_t width = n - first < block ? n - first : block;
    product_of<Acc, After::kMax, kVectors>(width, scratch.q, scratch.k[t] + first * d, width, d,
                                           scratch.p + first * kTile, scratch.max);
  }
  for (int r = 0; r < kVectors; ++r) {
    const Vec<Acc> max = load(scratch.max + r * W);
    Vec<Acc> sum = {};
    Acc* p = scratch.p + r * W;
    for (int64_t j = 0; j < n; ++j) {
      const Vec<Acc> x = exp2_nonpositive((load(p + j * kTile) - max) * scale);
      sum += x;
      store(p + j * kTile, x);
    }
    store(scratch.sum + r * W, sum);
  }
}

// z = weight p v, or z += weight p v.
template <typename Acc, After kAfter, int kVectors>
void weigh_values(const Attention& call, const Scratch<Acc>& scratch, int t) {
  const int64_t d = call.d, block = block_size(d);
  for (int64_t first = 0; first < d; first += block) {
    const int64_t width = d - first < block ? d - first : block;
    product_of<Acc, kAfter, kVectors>(width, scratch.p, scratch.v[t] + first, d, scratch.n[t],
                                      scratch.z + first * kTileRows<Acc>, scratch.weight);
  }
}

// A tile's queries, transposed; rows past the last and columns past d are zero.
template <typename T, typename Acc>
void load_queries(const Attention& call, const Task& task, int64_t m, int64_t count,
                  const Scratch<Acc>& scratch) {
  constexpr int W = kWidth<Acc>;
  constexpr int64_t kTile = kTileRows<Acc>;
  const int64_t d = call.d, stride = scratch.d_padded;
  const T* q = static_cast<const T*>(call.q) + task.b * call.q_stride[0] + m * call.q_stride[1] +
               task.h * call.q_stride[2];
  for (int64_t r = 0; r < kTile; ++r) {
    Acc* row = scratch.rows + r * stride;
    const int64_t filled = r < count ? d : 0;
    for (int64_t i = 0; i < filled; ++i) row[i] = widen(q[r * call.q_stride[1] + i]);
    for (int64_t i = filled; i < stride; ++i) row[i] = 0;
  }
  for (int64_t r = 0; r < kTile; r += W) {
    for (int64_t i = 0; i < stride; i += W) {
      transpose_square(scratch.rows + r * stride + i, stride, scratch.q + i * kTile + r, kTile);
    }
  }
}

template <typename T, typename Acc>
void store_tile(const Attention& call, const Task& task, int64_t m, int64_t count,
                const Scratch<Acc>& scratch, void* z_all) {
  constexpr int W = kWidth<Acc>;
  constexpr int64_t kTile = kTileRows<Acc>;
  const int64_t d = call.d, stride = scratch.d_padded;
  for (int64_t r = 0; r < count; r += W) {
    for (int64_t i = 0; i < stride; i += W) {
      transpose_square(scratch.z + i * kTile + r, kTile, scratch.rows + r * stride + i, stride);
    }
  }
  T* z = static_cast<T*>(z_all) + ((task.b * call.m + m) * call.h + task.h) * d;
  for (int64_t r = 0; r < count; ++r) {
    const Acc* row = scratch.rows + r * stride;
    T* to = z + r * call.h * d;
    for (int64_t i = 0; i < d; ++i) narrow(row[i], to + i);
  }
}

template <typename Acc>
void clear(Acc* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = 0;
}

// What a text counts for, divided by its softmax's sum: 1, -a or +a (see Attention).
template <typename Acc>
void set_weights(const Attention& call, const Task& task, int t, int64_t m, int64_t count,
                 const Scratch<Acc>& scratch) {
  const Acc* strength = static_cast<const Acc*>(call.strength);
  if (strength != nullptr) strength += task.b * call.m + m;
  const Acc sign = t == 1 ? -1 : 1;
  const bool own = call.twin || t == 0;
  for (int64_t r = 0; r < kTileRows<Acc>; ++r) {
    const bool inside = strength != nullptr && r < count;
    const Acc a = inside ? strength[r] : static_cast<Acc>(call.nasa_scale);
    scratch.weight[r] = (own ? Acc(1) : sign * a) / scratch.sum[r];
  }
}

template <typename Acc>
void store_lse(const Attention& call, const Task& task, int t, int64_t m, int64_t count,
               const Scratch<Acc>& scratch) {
  Acc* lse = static_cast<Acc*>(call.lse[t]) + (task.b * call.m + m) * call.h + task.h;
  for (int64_t r = 0; r < count; ++r) {
    const Acc largest = scratch.max[r] * static_cast<Acc>(__builtin_fabs(call.softmax_scale));
    const Acc sum = static_cast<Acc>(kLn2) * log2_of(scratch.sum[r]);
    lse[r * call.h] = scratch.n[t] == 0 ? static_cast<Acc>(-__builtin_inf()) : largest + sum;
  }
}

// One tile of kVectors vectors of query rows, `count` of which exist.
template <typename T, typename Acc, int kVectors>
void run_tile(const Attention& call, const Task& task, int64_t m, int64_t count,
              const Scratch<Acc>& scratch) {
  load_queries<T>(call, task, m, count, scratch);
  // The products leave columns past d alone; the transposition reads them.
  clear(scratch.z, scratch.d_padded * kTileRows<Acc>);
  bool first = true;
  for (int t = 0; t < call.num_texts; ++t) {
    if (scratch.n[t] > 0) {
      exponentials<Acc, kVectors>(call, scratch, t);
      set_weights(call, task, t, m, count, scratch);
      if (first) {
        weigh_values<Acc, After::kFirst, kVectors>(call, scratch, t);
      } else {
        weigh_values<Acc, After::kMore, kVectors>(call, scratch, t);
      }
      first = call.twin;
    } else if (call.twin) {
      clear(scratch.z, scratch.d_padded * kTileRows<Acc>);
    }
    if (call.twin) {
      store_tile<T>(call, task, m, count, scratch, call.z[t]);
      store_lse(call, task, t, m, count, scratch);
    }
  }
  if (!call.twin) store_tile<T>(call, task, m, count, scratch, call.z[0]);
}

template <typename T>
void run(const Attention& call, const Task& task, void* memory) {
  typedef typename AccOf<T>::Type Acc;
  Scratch<Acc> scratch;
  lay_out(call, static_cast<char*>(memory), &scratch);
  for (int t = 0; t < call.num_texts; ++t) pack_text<T>(call, task, t, &scratch);
  for (int64_t m = task.m_begin; m < task.m_end; m += kTileRows<Acc>) {
    const int64_t left = task.m_end - m;
    if (left > kWidth<Acc>) {
      const int64_t count = left < kTileRows<Acc> ? left : kTileRows<Acc>;
      run_tile<T, Acc, kTileVectors>(call, task, m, count, scratch);
    } else {
      run_tile<T, Acc, 1>(call, task, m, left, scratch);
    }
  }
}

template <typename T>
int64_t scratch_bytes(const Attention& call) {
  Scratch<typename AccOf<T>::Type> scratch;
  return lay_out(call, nullptr, &scratch);
}

template <typename T>
constexpr Kernel kernel() {
  return {scratch_bytes<T>, run<T>, kTileRows<typename AccOf<T>::Type>};
}

}  // namespace

#define SNOOPI_JOIN(a, b) a##b
#define SNOOPI_NAME(capability) SNOOPI_JOIN(kernels_, capability)
const Kernels SNOOPI_NAME(SNOOPI_CAPABILITY) = {kernel<float>(), kernel<BFloat16>(),
                                                kernel<double>()};

}  // namespace snoopi
