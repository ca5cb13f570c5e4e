// The fp32 kernel: the same attention in plain multiply-adds. Tensor cores would round the factors
// to 10 bits, which nobody who asks for fp32 expects.
//
// A block serves 64 query rows of one head. Eight threads share four rows: of the logits each has
// every eighth key, of z every eighth group of four columns. Texts pass in tiles of 32 keys.
#pragma once

#include "nasa_attend.h"

namespace snoopi {
inline namespace SIMT_BACKEND {

template <int D_>
struct PlainShape {
  static constexpr int D = D_, KT = 32, kRows = 64, kThreads = 128;
  static constexpr bool kSingle = false;
  static constexpr int kQuads = D / 4;                    // of columns
  static constexpr int kShare = (kQuads + 7) / 8;         // of a thread, at most
  static constexpr int kLogitSteps = kShare < 5 ? 2 : 1;  // at once: registers are short at 160
  static constexpr int kRowBytes = (kQuads | 1) * 16;     // odd, as in Shape
  // Rows of probabilities begin 8 banks apart: four rows of eight lanes touch all banks once.
  static constexpr int kProbabilityRow = (KT + 8) * 4;
  static constexpr int kKeysAt = kRows * kRowBytes;
  static constexpr int kValuesAt = kKeysAt + KT * kRowBytes;
  static constexpr int kProbabilitiesAt = kValuesAt + KT * kRowBytes;
  static constexpr int kLimitsAt = kProbabilitiesAt + kRows * kProbabilityRow;
  static constexpr int kSharedBytes = kLimitsAt + KT * 4;
};

template <int D>
struct PlainKernel {
  typedef PlainShape<D> S;
  static constexpr int kThreads = S::kThreads, kMinBlocks = 1;

  static Grid grid(const NasaParams& p) {
    return {static_cast<unsigned>((p.m + S::kRows - 1) / S::kRows), static_cast<unsigned>(p.h),
            static_cast<unsigned>(p.b)};
  }
  static int shared_bytes(const NasaParams&) { return S::kSharedBytes; }

  // Of a thread's four rows: z, or the text that is on.
  typedef float Rows[4][S::kShare][4];

  SIMT_DEVICE static int row_of(int i) { return thread_index() / 8 + 16 * i; }

  template <int kNumRows>
  SIMT_DEVICE static void copy_rows(int to, const float* from, int stride, int count) {
    for (int i = thread_index(); i < kNumRows * S::kQuads; i += kThreads) {
      const int row = i / S::kQuads, column = i % S::kQuads * 4;
      copy_async16(to + row * S::kRowBytes + 4 * column, from + row * stride + column, row < count);
    }
  }

  SIMT_DEVICE static void copy_tile(const NasaParams& p, const Tile& tile, const Cursor<S>& now) {
    const NasaText& text = p.texts[now.text];
    const int left = now.left(p);
    const float* k = static_cast<const float*>(text.k) + tile.batch * text.k_stride[0] +
                     now.key * text.k_stride[1] + tile.head * text.k_stride[2];
    const float* v = static_cast<const float*>(text.v) + tile.batch * text.v_stride[0] +
                     now.key * text.v_stride[1] + tile.head * text.v_stride[2];
    copy_rows<S::KT>(S::kKeysAt, k, static_cast<int>(text.k_stride[1]), left);
    copy_rows<S::KT>(S::kValuesAt, v, static_cast<int>(text.v_stride[1]), left);
    copy_commit();
    const int key = thread_index();
    if (key >= S::KT) return;
    bool live = key < left;
    if (live && text.mask != nullptr) {
      live = load_global(text.mask + tile.batch * text.mask_stride + now.key + key) != 0;
    }
    store_shared(S::kLimitsAt + 4 * key, live ? INFINITY : -INFINITY);
  }

  // s: of the thread's rows and keys, q k^T with dead keys at -inf.
  SIMT_DEVICE static void logits(float (&s)[4][4]) {
    const int lane = thread_index() % 8;
    SIMT_UNROLL
    for (int i = 0; i < 16; ++i) s[i / 4][i % 4] = 0.0f;
    SIMT_UNROLL_BY(S::kLogitSteps)
    for (int d = 0; d < S::kQuads; ++d) {
      Float4 q[4], k[4];
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i) q[i] = load_shared<Float4>(row_of(i) * S::kRowBytes + 16 * d);
      SIMT_UNROLL
      for (int j = 0; j < 4; ++j) {
        k[j] = load_shared<Float4>(S::kKeysAt + (lane + 8 * j) * S::kRowBytes + 16 * d);
      }
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i) {
        SIMT_UNROLL
        for (int j = 0; j < 4; ++j) {
          SIMT_UNROLL
          for (int e = 0; e < 4; ++e) s[i][j] += q[i].x[e] * k[j].x[e];
        }
      }
    }
    SIMT_UNROLL
    for (int j = 0; j < 4; ++j) {
      const float most = load_shared<float>(S::kLimitsAt + 4 * (lane + 8 * j));
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i) s[i][j] = fminf(s[i][j], most);
    }
  }

  // s becomes probabilities, unnormalised, which the eight threads of a row leave to each other.
  SIMT_DEVICE static void softmax(float (&s)[4][4], float scale_log2, float (&most)[4],
                                  float (&sum)[4], Rows& part) {
    const int lane = thread_index() % 8;
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) {
      float high = fmaxf(fmaxf(s[i][0], s[i][1]), fmaxf(s[i][2], s[i][3]));
      SIMT_UNROLL
      for (int lanes = 1; lanes < 8; lanes *= 2) high = fmaxf(high, shuffle_xor(high, lanes));
      high = fmaxf(high * scale_log2, most[i]);
      const float shrink = exp2_fast(most[i] - high);  // see Softmax::take
      most[i] = high;
      sum[i] *= shrink;
      SIMT_UNROLL
      for (int j = 0; j < 4; ++j) {
        s[i][j] = exp2_fast(s[i][j] * scale_log2 - high);
        sum[i] += s[i][j];
        store_shared(S::kProbabilitiesAt + row_of(i) * S::kProbabilityRow + 4 * (lane + 8 * j),
                     s[i][j]);
      }
      SIMT_UNROLL
      for (int j = 0; j < S::kShare; ++j) {
        SIMT_UNROLL
        for (int e = 0; e < 4; ++e) part[i][j][e] *= shrink;
      }
    }
  }

  SIMT_DEVICE static void add_values(Rows& part) {
    const int lane = thread_index() % 8;
    SIMT_UNROLL_BY(1)
    for (int key = 0; key < S::KT; key += 4) {
      Float4 p[4];
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i) {
        p[i] = load_shared<Float4>(S::kProbabilitiesAt + row_of(i) * S::kProbabilityRow + 4 * key);
      }
      SIMT_UNROLL
      for (int e = 0; e < 4; ++e) {
        SIMT_UNROLL
        for (int j = 0; j < S::kShare; ++j) {
          // Lanes without a share of the last columns repeat them and store nothing.
          const int quad = smaller(lane + 8 * j, S::kQuads - 1);
          const int at = S::kValuesAt + (key + e) * S::kRowBytes + 16 * quad;
          const Float4 v = load_shared<Float4>(at);
          SIMT_UNROLL
          for (int i = 0; i < 4; ++i) {
            SIMT_UNROLL
            for (int c = 0; c < 4; ++c) part[i][j][c] += p[i].x[e] * v.x[c];
          }
        }
      }
    }
  }

  SIMT_DEVICE static void clear(Rows& rows) {
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) {
      SIMT_UNROLL
      for (int j = 0; j < S::kShare; ++j) {
        SIMT_UNROLL
        for (int e = 0; e < 4; ++e) rows[i][j][e] = 0.0f;
      }
    }
  }

  // z += w / l of a text that is done, and its log-sum-exp.
  SIMT_DEVICE static void finish(const NasaParams& p, const Tile& tile, int text,
                                 const float (&most)[4], float (&sum)[4], const Rows& part,
                                 Rows& z) {
    float* lse = p.lse[text];
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) {
      SIMT_UNROLL
      for (int lanes = 1; lanes < 8; lanes *= 2) sum[i] += shuffle_xor(sum[i], lanes);
      const int row = row_of(i);
      const bool live = row < tile.count;
      const int64_t query = tile.first + row;
      float weight = 1.0f;
      if (text > 0 && !p.twin) {
        weight = p.nasa_scale;
        if (p.strength != nullptr) {
          const float* at = p.strength + tile.batch * p.strength_stride[0];
          weight = live ? load_global(at + query * p.strength_stride[1]) : 0.0f;
        }
        weight = text == 1 ? -weight : weight;
      }
      const float by = sum[i] == 0.0f ? 0.0f : weight * reciprocal_fast(sum[i]);
      SIMT_UNROLL
      for (int j = 0; j < S::kShare; ++j) {
        SIMT_UNROLL
        for (int e = 0; e < 4; ++e) z[i][j][e] += part[i][j][e] * by;
      }
      if (lse == nullptr || !live || thread_index() % 8 != 0) continue;
      const float log_sum = (most[i] + log2_fast(sum[i])) * kLn2;
      store_global(lse + (tile.batch * p.m + query) * p.h + tile.head,
                   sum[i] == 0.0f ? -INFINITY : log_sum);
    }
  }

  SIMT_DEVICE static void store(const NasaParams& p, const Tile& tile, void* out, const Rows& z) {
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (row_of(i) >= tile.count) continue;
      const int64_t row = (tile.batch * p.m + tile.first + row_of(i)) * p.h + tile.head;
      SIMT_UNROLL
      for (int j = 0; j < S::kShare; ++j) {
        const int quad = thread_index() % 8 + 8 * j;
        if (quad >= S::kQuads) continue;
        const Float4 x = {{z[i][j][0], z[i][j][1], z[i][j][2], z[i][j][3]}};
        store_global(reinterpret_cast<Float4*>(static_cast<float*>(out) + row * D + 4 * quad), x);
      }
    }
  }

  SIMT_DEVICE static void run(const NasaParams& p) {
    const int first = block_x() * S::kRows;
    const Tile tile = {block_z(), block_y(), first,
                       smaller(S::kRows, static_cast<int>(p.m) - first)};
    const float* q = static_cast<const float*>(p.q) + tile.batch * p.q_stride[0] +
                     first * p.q_stride[1] + tile.head * p.q_stride[2];
    copy_rows<S::kRows>(0, q, static_cast<int>(p.q_stride[1]), tile.count);
    const float scale_log2 = p.softmax_scale * kLog2E;
    Rows z, part;
    float most[4], sum[4];
    clear(z);
    clear(part);
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) {
      most[i] = kLowest;
      sum[i] = 0.0f;
    }
    for (Cursor<S> now; !now.done(p); now.next(p)) {
      if (now.text > 0 || now.key > 0) block_sync();  // nobody reads the last tile any more
      copy_tile(p, tile, now);
      copy_wait<0>();
      block_sync();
      float s[4][4];
      logits(s);
      softmax(s, scale_log2, most, sum, part);
      warp_sync();  // the threads of a row are of one warp
      add_values(part);
      if (!now.last_of_text(p)) continue;
      finish(p, tile, now.text, most, sum, part, z);
      if (p.twin) {
        store(p, tile, p.out[now.text], z);
        clear(z);
      }
      clear(part);
      SIMT_UNROLL
      for (int i = 0; i < 4; ++i) {
        most[i] = kLowest;
        sum[i] = 0.0f;
      }
    }
    if (!p.twin) store(p, tile, p.out[0], z);
  }
};

}  // namespace SIMT_BACKEND
}  // namespace snoopi
