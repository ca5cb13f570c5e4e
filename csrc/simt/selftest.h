// Kernels that misuse the machine in one way each, and some that do not: the emulation must tell
// them apart. Two warps unless said otherwise; shared memory has room for four floats a thread.
#pragma once

#include <string>

#include "../cuda/simt.h"

namespace snoopi {
namespace selftest {

constexpr int kThreads = 64;
constexpr int kSharedBytes = kThreads * 16;

struct Params {
  const float* in;    // [4 kThreads]
  float* out;         // [kThreads] or what a case says
  const uint16_t* a;  // [16 16] bf16
  const uint16_t* b;  // [8 16] bf16
};

// Most kernels write their thread's element of `out`.
struct Kernel {
  static constexpr int kThreads = selftest::kThreads;
  static void put(const Params& p, float x) { store_global(p.out + thread_index(), x); }
};

// Right: every thread reads its neighbour's element, by shared memory, shuffle and copy.
struct Clean : Kernel {
  static void run(const Params& p) {
    const int t = thread_index();
    store_shared(4 * t, load_global(p.in + t));
    block_sync();
    const float neighbour = load_shared<float>(4 * ((t + 1) % kThreads));
    block_sync();
    copy_async16(16 * t, p.in + 4 * t, true);
    copy_commit();
    copy_wait<0>();
    block_sync();
    const float copied = load_shared<float>(4 * ((t + 1) % kThreads));
    warp_sync();
    put(p, neighbour + copied + shuffle_xor(static_cast<float>(t), 1));
  }
};

struct NoBarrier : Kernel {  // read of what another warp wrote
  static void run(const Params& p) {
    store_shared(4 * thread_index(), 1.0f);
    warp_sync();
    put(p, load_shared<float>(4 * ((thread_index() + 32) % kThreads)));
  }
};

struct NoWarpSync : Kernel {  // read of what another lane wrote
  static void run(const Params& p) {
    store_shared(4 * thread_index(), 1.0f);
    put(p, load_shared<float>(4 * (thread_index() ^ 1)));
  }
};

struct ShuffleForSync : Kernel {  // a shuffle makes a warp meet but orders no memory
  static void run(const Params& p) {
    store_shared(4 * thread_index(), 1.0f);
    const float x = shuffle_xor(1.0f, 1);
    put(p, x + load_shared<float>(4 * (thread_index() ^ 1)));
  }
};

struct WriteAfterRead : Kernel {  // no barrier before the second round
  static void run(const Params& p) {
    store_shared(4 * thread_index(), 1.0f);
    block_sync();
    const float x = load_shared<float>(4 * ((thread_index() + 32) % kThreads));
    store_shared(4 * thread_index(), 2.0f);
    put(p, x);
  }
};

struct Uninitialised : Kernel {
  static void run(const Params& p) { put(p, load_shared<float>(4 * thread_index())); }
};

struct CopyReadTooEarly : Kernel {
  static void run(const Params& p) {
    copy_async16(16 * thread_index(), p.in + 4 * thread_index(), true);
    copy_commit();
    const float x = load_shared<float>(16 * thread_index());
    copy_wait<0>();
    put(p, x);
  }
};

struct CopyOverwrittenTooEarly : Kernel {
  static void run(const Params& p) {
    copy_async16(16 * thread_index(), p.in + 4 * thread_index(), true);
    copy_commit();
    store_shared(16 * thread_index(), 1.0f);
    copy_wait<0>();
    put(p, 0.0f);
  }
};

struct CopyWaitLeavesOne : Kernel {  // the wait allows the group that is needed to be on its way
  static void run(const Params& p) {
    copy_async16(16 * thread_index(), p.in + 4 * thread_index(), true);
    copy_commit();
    copy_wait<1>();
    const float x = load_shared<float>(16 * thread_index());
    copy_wait<0>();
    put(p, x);
  }
};

struct CopyWithoutBarrier : Kernel {  // a wait tells only the thread that copied
  static void run(const Params& p) {
    copy_async16(16 * thread_index(), p.in + 4 * thread_index(), true);
    copy_commit();
    copy_wait<0>();
    put(p, load_shared<float>(16 * ((thread_index() + 32) % kThreads)));
  }
};

struct CopyUncommitted : Kernel {
  static void run(const Params& p) {
    copy_async16(16 * thread_index(), p.in + 4 * thread_index(), true);
    copy_wait<0>();
    put(p, 0.0f);
  }
};

struct CopyInFlight : Kernel {
  static void run(const Params& p) {
    copy_async16(16 * thread_index(), p.in + 4 * thread_index(), true);
    copy_commit();
    put(p, 0.0f);
  }
};

struct SharedBounds : Kernel {  // the last thread is one float too far
  static void run(const Params& p) {
    store_shared(kSharedBytes - 4 * (kThreads - 2) + 4 * thread_index() - 4, 1.0f);
    put(p, 0.0f);
  }
};

struct SharedAlignment : Kernel {
  static void run(const Params& p) {
    if (thread_index() < 8) store_shared(16 * thread_index() + 8, Float4{});
    put(p, 0.0f);
  }
};

struct GlobalBounds : Kernel {
  static void run(const Params& p) { put(p, load_global(p.in + 4 * thread_index() + 4)); }
};

struct GlobalAlignment : Kernel {
  static void run(const Params& p) {
    const int t = thread_index() % 8;
    put(p, load_global(reinterpret_cast<const Float4*>(p.in + 2 * t)).x[0]);
  }
};

struct WrittenTwice : Kernel {
  static void run(const Params& p) {
    put(p, 0.0f);
    if (thread_index() == 5) store_global(p.out + 6, 0.0f);
  }
};

struct NotWritten : Kernel {
  static void run(const Params& p) {
    if (thread_index() != 5) put(p, 0.0f);
  }
};

struct Divergent : Kernel {  // the halves of a warp meet at different shuffles
  static void run(const Params& p) {
    float x = 0.0f;
    if (thread_index() % 32 < 16) {
      x = shuffle_xor(1.0f, 1);
    } else {
      x = shuffle_xor(2.0f, 1);
    }
    put(p, x);
  }
};

struct HalfWarp : Kernel {
  static void run(const Params& p) {
    put(p, thread_index() % 32 < 16 ? shuffle_xor(1.0f, 1) : 0.0f);
  }
};

struct WarpSkipsBarrier : Kernel {
  static void run(const Params& p) {
    if (thread_index() < 32) block_sync();
    put(p, 0.0f);
  }
};

struct DifferentBarriers : Kernel {
  static void run(const Params& p) {
    if (thread_index() < 32) {
      block_sync();
    } else {
      block_sync();
    }
    put(p, 0.0f);
  }
};

struct Conflicts : Kernel {  // a stride of eight words: eight lanes to a bank
  static void run(const Params& p) {
    if (thread_index() < 32) store_shared(32 * thread_index(), 1.0f);
    put(p, 0.0f);
  }
};

struct Sectors : Kernel {  // loads every fourth float: four times the sectors
  static void run(const Params& p) { put(p, load_global(p.in + 4 * thread_index())); }
};

// out [16 8] = a b^T by matrix loads and one product.
struct Product : Kernel {
  static constexpr int kThreads = 32;
  static void run(const Params& p) {
    const int t = thread_index();
    const int a = 0, b = 16 * 32;  // byte offsets of a [16 16], b [8 16]
    copy_async16(a + 16 * t, p.a + 8 * t, true);
    if (t < 16) copy_async16(b + 16 * t, p.b + 8 * t, true);
    copy_commit();
    copy_wait<0>();
    warp_sync();
    uint32_t left[4], right[4];
    load_matrices4(left, a + 32 * (t % 16) + 16 * (t / 16));
    load_matrices4(right, b + 32 * (t % 8) + 16 * (t / 8 % 2));
    float c[4] = {};
    multiply_16816<BFloat16>(c, left, right[0], right[1]);
    for (int i = 0; i < 4; ++i) {
      store_global(p.out + 8 * (t / 4 + i / 2 * 8) + t % 4 * 2 + i % 2, c[i]);
    }
  }
};

// out [8 16] = the transpose of a's first eight columns, by a matrix load that transposes.
struct Transposed : Kernel {
  static constexpr int kThreads = 32;
  static void run(const Params& p) {
    const int t = thread_index();
    copy_async16(16 * t, p.a + 8 * t, true);
    copy_commit();
    copy_wait<0>();
    warp_sync();
    uint32_t x[2];
    load_matrices2_transposed(x, 32 * (t % 16));
    for (int i = 0; i < 2; ++i) {  // row t / 4 of the transpose of matrix i
      const float low = widen(BFloat16{static_cast<uint16_t>(x[i])});
      const float high = widen(BFloat16{static_cast<uint16_t>(x[i] >> 16)});
      store_global(p.out + 16 * (t / 4) + 8 * i + t % 4 * 2, low);
      store_global(p.out + 16 * (t / 4) + 8 * i + t % 4 * 2 + 1, high);
    }
  }
};

typedef int (*Launch)(const Params&);

template <typename K>
int launch_one(const Params& params) {
  return launch<K>(Grid{1, 1, 1}, kSharedBytes, nullptr, params);
}

struct Case {
  const char* name;
  Launch launch;
  int written;  // elements of `out`
};

inline const Case* cases(int& num) {
  static const Case list[] = {
      {"clean", launch_one<Clean>, kThreads},
      {"no barrier", launch_one<NoBarrier>, kThreads},
      {"no warp sync", launch_one<NoWarpSync>, kThreads},
      {"shuffle for sync", launch_one<ShuffleForSync>, kThreads},
      {"write after read", launch_one<WriteAfterRead>, kThreads},
      {"uninitialised", launch_one<Uninitialised>, kThreads},
      {"copy read too early", launch_one<CopyReadTooEarly>, kThreads},
      {"copy overwritten too early", launch_one<CopyOverwrittenTooEarly>, kThreads},
      {"copy wait leaves one", launch_one<CopyWaitLeavesOne>, kThreads},
      {"copy without barrier", launch_one<CopyWithoutBarrier>, kThreads},
      {"copy uncommitted", launch_one<CopyUncommitted>, kThreads},
      {"copy in flight", launch_one<CopyInFlight>, kThreads},
      {"shared bounds", launch_one<SharedBounds>, kThreads},
      {"shared alignment", launch_one<SharedAlignment>, kThreads},
      {"global bounds", launch_one<GlobalBounds>, kThreads},
      {"global alignment", launch_one<GlobalAlignment>, kThreads},
      {"written twice", launch_one<WrittenTwice>, kThreads},
      {"not written", launch_one<NotWritten>, kThreads},
      {"divergent", launch_one<Divergent>, kThreads},
      {"half warp", launch_one<HalfWarp>, kThreads},
      {"warp skips barrier", launch_one<WarpSkipsBarrier>, kThreads},
      {"different barriers", launch_one<DifferentBarriers>, kThreads},
      {"conflicts", launch_one<Conflicts>, kThreads},
      {"sectors", launch_one<Sectors>, kThreads},
      {"product", launch_one<Product>, 128},
      {"transposed", launch_one<Transposed>, 128},
  };
  num = static_cast<int>(sizeof(list) / sizeof(list[0]));
  return list;
}

}  // namespace selftest
}  // namespace snoopi
