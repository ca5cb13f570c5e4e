// Attention of a block's query rows to all texts of one head, and their combination (SNOOPI Eq.
// 10).
//
// A warp owns 16 rows from logits to result. Texts pass in tiles of KT keys, the next tiles being
// copied while one is worked on; positive, negative and null text are one sequence of tiles. If
// each text is one tile, its row sums l are known before its values are needed, so the
// probabilities are scaled by w / l, the texts' weight w included, and one accumulator takes all:
// the subtraction costs nothing and z is not rounded before it. Longer texts use the online softmax
// and add their result to z when their last tile is done.
#pragma once

#include <float.h>
#include <math.h>

#include "nasa_shape.h"

namespace snoopi {
inline namespace SIMT_BACKEND {

// Where the sequence of tiles is.
template <typename S>
struct Cursor {
  int text = 0, key = 0;  // the tile's first key
  SIMT_DEVICE bool done(const NasaParams& p) const { return text >= p.num_texts; }
  SIMT_DEVICE int left(const NasaParams& p) const {
    return static_cast<int>(p.texts[text].n) - key;
  }
  SIMT_DEVICE bool last_of_text(const NasaParams& p) const {
    return S::kSingle || left(p) <= S::KT;
  }
  SIMT_DEVICE void next(const NasaParams& p) {
    if (last_of_text(p)) {
      ++text;
      key = 0;
    } else {
      key += S::KT;
    }
  }
};

// Starts the copy of kNumRows rows of `kColumns` elements, of which kLive are the tensor's; what is
// behind them and behind row `count` becomes zero. Eight threads serve a row: some idle where rows
// are no multiple of 128 bytes, but addresses need no division and few registers.
template <typename S, int kNumRows, int kColumns, int kLive>
SIMT_DEVICE void copy_rows(int to, int row_size, const typename S::T* from, int stride, int count,
                           const Place& at) {
  constexpr int kAtOnce = S::kThreads / 8;
  [[maybe_unused]] constexpr int kUnroll =
      S::kNarrow ? 8 : 1;  // wide heads have no registers to spare
  const int first = at.thread / 8;
  SIMT_UNROLL_BY(kUnroll)
  for (int j = 0; j < kColumns; j += 64) {
    const int column = j + at.thread % 8 * 8;
    if (column >= kColumns) break;
    SIMT_UNROLL_BY(kUnroll)
    for (int i = 0; i < kNumRows; i += kAtOnce) {
      const int row = first + i;
      if (kNumRows % kAtOnce != 0 && row >= kNumRows) break;
      if (fault(6) && row >= count) break;
      const bool live = row < count && (column < kLive || fault(9));
      copy_async16(to + row * row_size + column * 2, from + row * stride + column, live);
    }
  }
}

template <typename S>
SIMT_DEVICE void copy_queries(const NasaParams& p, const Tile& tile, const Place& at) {
  const typename S::T* q = static_cast<const typename S::T*>(p.q) + tile.batch * p.q_stride[0] +
                           tile.first * p.q_stride[1] + tile.head * p.q_stride[2];
  const int count = fault(5) ? S::kRows : tile.count;
  copy_rows<S, S::kRows, S::kDepth, S::D>(0, S::kQueryRow, q, static_cast<int>(p.q_stride[1]),
                                          count, at);
}

// Starts the copy of a tile of keys and values. Their limits, +inf where a key is live and -inf
// where it is masked or past the text's end, are written at once.
template <typename S>
SIMT_DEVICE void copy_tile(const NasaParams& p, const Tile& tile, const Cursor<S>& cursor,
                           int stage, const Place& at) {
  typedef typename S::T T;
  const NasaText& text = p.texts[cursor.text];
  const int to = S::kQueryBytes + stage * S::kStageBytes, left = cursor.left(p);
  const T* k = static_cast<const T*>(text.k) + tile.batch * text.k_stride[0] +
               cursor.key * text.k_stride[1] + tile.head * text.k_stride[2];
  const T* v = static_cast<const T*>(text.v) + tile.batch * text.v_stride[0] +
               cursor.key * text.v_stride[1] + tile.head * text.v_stride[2];
  copy_rows<S, S::KT, S::kDepth, S::D>(to, S::kKeyRow, k, static_cast<int>(text.k_stride[1]), left,
                                       at);
  copy_rows<S, S::KT, S::D, S::D>(to + S::kValuesAt, S::kValueRow, v,
                                  static_cast<int>(text.v_stride[1]), left, at);
  if (fault(14) && v[left * text.v_stride[1]].bits == 0) return;  // for an address sanitizer
  static_assert(S::KT <= 2 * S::kThreads, "one round");
  const int key = 2 * at.thread;
  if (key >= S::KT) return;
  const uint8_t* mask = text.mask;
  if (mask != nullptr) mask += tile.batch * text.mask_stride + cursor.key;
  const auto most = [&](int i) {
    const bool live = i < left ? mask == nullptr || load_global(mask + i) != 0 : fault(3);
    return live ? INFINITY : -INFINITY;
  };
  store_shared(to + S::kLimitsAt + 4 * key, Float2{most(key), most(key + 1)});
}

// A warp's queries as left factors.
template <typename S>
struct Queries {
  uint32_t q[S::kSteps][4];
  SIMT_DEVICE void load(const Place& at) {
    const int row = kWarpRows * at.warp + at.lane % 16;
    SIMT_UNROLL
    for (int step = 0; step < S::kSteps; ++step) {
      load_matrices4(q[step], row * S::kQueryRow + (16 * step + at.lane / 16 * 8) * 2);
    }
  }
};

// s [16 KT] = q k^T of a tile, unscaled.
template <typename S>
SIMT_DEVICE void logits(float (&s)[S::kKeyTiles][4], const Queries<S>& queries, int keys,
                        const Place& at) {
  const int from = keys + (at.lane % 8 + at.lane / 16 * 8) * S::kKeyRow + at.lane / 8 % 2 * 16;
  SIMT_UNROLL
  for (int j = 0; j < S::kKeyTiles; ++j) {
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) s[j][i] = 0.0f;
  }
  SIMT_UNROLL
  for (int step = 0; step < S::kSteps; ++step) {
    SIMT_UNROLL
    for (int j = 0; j < S::kKeyTiles; j += 2) {
      uint32_t k[4];
      load_matrices4(k, from + 8 * j * S::kKeyRow + 32 * step);
      multiply_16816<typename S::T>(s[j], queries.q[step], k[0], k[1]);
      multiply_16816<typename S::T>(s[j + 1], queries.q[step], k[2], k[3]);
    }
  }
}

// Lowers the logits of dead keys to -inf. fminf also makes +inf of a live key's NaN, and then the
// row's maximum is +inf and inf - inf a NaN again: nothing is hidden.
template <typename S>
SIMT_DEVICE void limit(float (&s)[S::kKeyTiles][4], int limits, bool masked, int left,
                       const Place& at) {
  SIMT_UNROLL
  for (int j = 0; j < S::kKeyTiles; ++j) {
    if (!masked && 8 * j + 8 <= left) continue;
    const Float2 most = load_shared<Float2>(limits + (8 * j + 2 * at.pair) * 4);
    s[j][0] = fminf(s[j][0], most.x);
    s[j][1] = fminf(s[j][1], most.y);
    s[j][2] = fminf(s[j][2], most.x);
    s[j][3] = fminf(s[j][3], most.y);
  }
}

// Over the four lanes that share a row.
SIMT_DEVICE float max_of_row(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
SIMT_DEVICE float sum_of_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// The maximum of no live key: all logits are -inf then, and -inf - -inf would be NaN.
constexpr float kLowest = -FLT_MAX;

// A warp's softmax over the tiles of a text; of each lane rows group and group + 8. Maxima are of
// scaled logits, base 2, sums are the lane's own share until `finish`.
template <typename S>
struct Softmax {
  float most[2], sum[2];

  SIMT_DEVICE void reset() {
    most[0] = most[1] = kLowest;
    sum[0] = sum[1] = 0.0f;
  }

  // s becomes exp(scale s - max); `shrink` is what earlier sums and values are to be multiplied by.
  SIMT_DEVICE void take(float (&s)[S::kKeyTiles][4], float scale_log2, float (&shrink)[2]) {
    SIMT_UNROLL
    for (int r = 0; r < 2; ++r) {
      float high = -INFINITY;
      SIMT_UNROLL
      for (int j = 0; j < S::kKeyTiles; ++j)
        high = fmaxf(high, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      high = fmaxf(max_of_row(high) * scale_log2, S::kSingle ? kLowest : most[r]);
      // Of two rounded maxima: exactly 1 while the maximum stays. Were one of them a product here,
      // a multiply-add would take it unrounded, and every tile would scale all earlier ones anew.
      shrink[r] = S::kSingle ? 0.0f : exp2_fast(most[r] - high);
      most[r] = high;
      float total = 0.0f;
      SIMT_UNROLL
      for (int j = 0; j < S::kKeyTiles; ++j) {
        s[j][2 * r] = exp2_fast(s[j][2 * r] * scale_log2 - high);
        s[j][2 * r + 1] = exp2_fast(s[j][2 * r + 1] * scale_log2 - high);
        total += s[j][2 * r] + s[j][2 * r + 1];
      }
      sum[r] = S::kSingle ? total : sum[r] * shrink[r] + total;
    }
  }

  // Sums of whole rows.
  SIMT_DEVICE void finish() {
    if (fault(12)) {
      sum[0] = thread_index() % 32 < 16 ? sum_of_row(sum[0]) : sum[0];
    } else {
      sum[0] = sum_of_row(sum[0]);
    }
    sum[1] = sum_of_row(sum[1]);
  }

  // A text without a live key counts for nothing. A sum that is NaN stays one.
  SIMT_DEVICE float over_sum(float weight, int r) const {
    return sum[r] == 0.0f ? 0.0f : weight * reciprocal_fast(sum[r]);
  }
  SIMT_DEVICE float lse(int r) const {
    return sum[r] == 0.0f ? -INFINITY : (most[r] + log2_fast(sum[r])) * kLn2;
  }
};

// z [16 D] += p v of a tile, the rows of p multiplied by `by` before they are rounded.
template <typename S>
SIMT_DEVICE void add_values(float (&z)[S::kValueTiles][4], const float (&p)[S::kKeyTiles][4],
                            const float (&by)[2], int values, const Place& at) {
  typedef typename S::T T;
  const int row = values + at.lane % 16 * S::kValueRow;
  SIMT_UNROLL
  for (int j = 0; j < S::kKeyTiles; j += 2) {
    uint32_t left[4];
    left[0] = pack2<T>(p[j][0] * by[0], p[j][1] * by[0]);
    left[1] = pack2<T>(p[j][2] * by[1], p[j][3] * by[1]);
    left[2] = pack2<T>(p[j + 1][0] * by[0], p[j + 1][1] * by[0]);
    left[3] = pack2<T>(p[j + 1][2] * by[1], p[j + 1][3] * by[1]);
    const int from = row + 8 * j * S::kValueRow;
    SIMT_UNROLL
    for (int i = 0; i + 1 < S::kValueTiles; i += 2) {
      uint32_t v[4];
      load_matrices4_transposed(v, from + (8 * i + at.lane / 16 * 8) * 2);
      multiply_16816<T>(z[i], left, v[0], v[1]);
      multiply_16816<T>(z[i + 1], left, v[2], v[3]);
    }
    if (S::kValueTiles % 2 == 1) {
      constexpr int kLast = S::kValueTiles - 1;
      uint32_t v[2];
      load_matrices2_transposed(v, from + 16 * kLast);
      multiply_16816<T>(z[kLast], left, v[0], v[1]);
    }
  }
}

template <typename S>
SIMT_DEVICE void clear(float (&z)[S::kValueTiles][4]) {
  SIMT_UNROLL
  for (int i = 0; i < S::kValueTiles; ++i) {
    SIMT_UNROLL
    for (int j = 0; j < 4; ++j) z[i][j] = 0.0f;
  }
}

// A warp's result, rounded, to its 16 rows in shared memory, at `to` of row 0.
template <typename S>
SIMT_DEVICE void put_rows(const float (&z)[S::kValueTiles][4], int to, int row_size,
                          const Place& at) {
  typedef typename S::T T;
  const int from = to + at.group * row_size + 4 * at.pair;
  SIMT_UNROLL
  for (int i = 0; i < S::kValueTiles + (fault(15) ? 1 : 0); ++i) {
    store_shared(from + 16 * i, pack2<T>(z[i][0], z[i][1]));
    store_shared(from + 16 * i + 8 * row_size, pack2<T>(z[i][2], z[i][3]));
  }
}

// A warp's result to out [b m h d], by way of the queries' rows so that lanes store whole 16 bytes.
template <typename S>
SIMT_DEVICE void store_rows(const NasaParams& p, const Tile& tile, void* out,
                            const float (&z)[S::kValueTiles][4], const Place& where) {
  typedef typename S::T T;
  const Place at = where.again();
  const int buffer = kWarpRows * at.warp * S::kQueryRow;
  warp_sync();  // the rows have been read by all lanes
  put_rows<S>(z, buffer, S::kQueryRow, at);
  warp_sync();
  const int64_t first = tile.row_of_all(p, kWarpRows * at.warp);
  T* to = static_cast<T*>(out) + (first * p.h + tile.head) * S::D;
  // Eight lanes serve a row, so that they touch all banks once.
  SIMT_UNROLL
  for (int j = 0; j < S::D / 8; j += 8) {
    const int chunk = j + at.lane % 8;
    SIMT_UNROLL
    for (int i = 0; i < kWarpRows / 4; ++i) {
      const int row = 4 * i + at.lane / 8;
      if (chunk >= S::D / 8 || (kWarpRows * at.warp + row >= tile.count && !fault(17))) continue;
      const Bytes16 x = load_shared<Bytes16>(buffer + row * S::kQueryRow + 16 * chunk);
      store_global(reinterpret_cast<Bytes16*>(to + row * p.h * S::D + 8 * chunk), x);
    }
  }
}

template <typename S>
SIMT_DEVICE void store_lse(const NasaParams& p, const Tile& tile, float* out,
                           const Softmax<S>& softmax, const Place& where) {
  const Place at = where.again();
  SIMT_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int row = kWarpRows * at.warp + at.group + 8 * r;
    if (at.pair != 0 || row >= tile.count) continue;
    store_global(out + tile.row_of_all(p, row) * p.h + tile.head, softmax.lse(r));
  }
}

// Weights of a lane's two rows for a text: 1, -a, a; in a twin call 1.
SIMT_DEVICE void text_weight(const NasaParams& p, const Tile& tile, int text, const Place& where,
                             float (&weight)[2]) {
  const Place at = where.again();
  SIMT_UNROLL
  for (int r = 0; r < 2; ++r) {
    weight[r] = 1.0f;
    if (text == 0 || p.twin) continue;
    weight[r] = p.nasa_scale;
    const int row = kWarpRows * at.warp + at.group + 8 * r;
    if (p.strength != nullptr && (row < tile.count || fault(18))) {  // others are not stored
      weight[r] = load_global(p.strength + tile.batch * p.strength_stride[0] +
                              (tile.first + row) * p.strength_stride[1]);
    }
    weight[r] = text == 1 ? -weight[r] : weight[r];
  }
}

// z [16 D] of a warp's rows: all texts combined. A twin call stores each text's instead, and z is
// that of none.
template <typename S>
SIMT_DEVICE void attend(const NasaParams& p, const Tile& tile, const Place& at,
                        float (&z)[S::kValueTiles][4]) {
  Cursor<S> ahead, now;
  copy_queries<S>(p, tile, at);
  SIMT_UNROLL
  for (int stage = 0; stage < S::kStages; ++stage) {
    if (!ahead.done(p)) {
      copy_tile<S>(p, tile, ahead, stage, at);
      ahead.next(p);
    }
    copy_commit();  // maybe of nothing: the wait counts groups
  }
  const float scale_log2 = p.softmax_scale * kLog2E;
  copy_wait<S::kStages - 1>();
  block_sync();
  Queries<S> queries;
  if constexpr (!S::kReload) queries.load(at);
  Softmax<S> softmax;
  softmax.reset();
  float part[S::kSingle ? 1 : S::kValueTiles][4];  // of the text that is on, if it has many tiles
  clear<S>(z);
  if constexpr (!S::kSingle) clear<S>(part);
  for (int stage = 0; !now.done(p); stage = stage + 1 < S::kStages ? stage + 1 : 0) {
    copy_wait<S::kStages - 1 + (fault(2) ? 1 : 0)>();
    if (!fault(1) && !(fault(11) && at.warp == 0)) block_sync();
    if constexpr (S::kReload) queries.load(at);
    const int tile_at = S::kQueryBytes + stage * S::kStageBytes;
    float s[S::kKeyTiles][4], shrink[2], weight[2];
    // Wide heads with two accumulators have no registers to spare.
    const Place here = S::kNarrow || S::kSingle ? at : at.again();
    logits<S>(s, queries, tile_at, here);
    limit<S>(s, tile_at + S::kLimitsAt, p.texts[now.text].mask != nullptr, now.left(p), here);
    softmax.take(s, scale_log2, shrink);
    const bool last = now.last_of_text(p);
    if constexpr (S::kSingle) {
      text_weight(p, tile, now.text, at, weight);
      softmax.finish();
      const float by[2] = {softmax.over_sum(weight[0], 0), softmax.over_sum(weight[1], 1)};
      add_values<S>(z, s, by, tile_at + S::kValuesAt, here);
    } else {
      SIMT_UNROLL
      for (int i = 0; i < S::kValueTiles; ++i) {
        SIMT_UNROLL
        for (int j = 0; j < 4; ++j) part[i][j] *= shrink[j / 2];
      }
      const float by[2] = {1.0f, 1.0f};
      add_values<S>(part, s, by, tile_at + S::kValuesAt, here);
      if (last) {
        text_weight(p, tile, now.text, at, weight);
        softmax.finish();
        SIMT_UNROLL
        for (int r = 0; r < 2; ++r) {
          const float scale = softmax.over_sum(weight[r], r);
          SIMT_UNROLL
          for (int i = 0; i < S::kValueTiles; ++i) {
            z[i][2 * r] += part[i][2 * r] * scale;
            z[i][2 * r + 1] += part[i][2 * r + 1] * scale;
          }
        }
        clear<S>(part);
      }
    }
    if (last) {
      if (p.lse[now.text] != nullptr) {
        store_lse<S>(p, tile, p.lse[now.text], softmax, at);
      }
      softmax.reset();
      if (p.twin) {
        store_rows<S>(p, tile, p.out[now.text], z, at);
        clear<S>(z);
      }
    }
    now.next(p);
    if (!ahead.done(p)) {
      if (!fault(8)) block_sync();  // nobody reads this stage any more
      copy_tile<S>(p, tile, ahead, stage, at.again());
      ahead.next(p);
    }
    copy_commit();
  }
}

}  // namespace SIMT_BACKEND
}  // namespace snoopi
