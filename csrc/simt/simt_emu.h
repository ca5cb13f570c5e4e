// The primitives of simt.h on the host: what simt_cuda.h does in PTX, with every use checked.
//
// A warp's lanes meet at each collective, and the last to come does the work for all. Products are
// summed in fp32, one after the other by ascending depth; a tensor core sums aligned and truncated.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "convert.h"
#include "machine.h"

namespace snoopi {
inline namespace SIMT_BACKEND {

using emulation::Access;
using emulation::Lane;
using emulation::Machine;
using emulation::machine;
using emulation::Meeting;
using emulation::Site;
using emulation::widen;

inline int thread_index() { return static_cast<int>(machine.self->thread); }
inline int block_x() { return machine.block[0]; }
inline int block_y() { return machine.block[1]; }
inline int block_z() { return machine.block[2]; }

inline int opaque(int x) { return x; }

inline void block_sync(Site site = Site::here()) { machine.meet_block(site); }
inline void warp_sync(Site site = Site::here()) {
  machine.meet_warp(Meeting::kWarpSync, site, nullptr, nullptr);
}

inline float shuffle_xor(float x, int lanes, Site site = Site::here()) {
  struct Argument {
    float x, result;
    int lanes;
  } argument = {x, 0.0f, lanes};
  machine.meet_warp(Meeting::kShuffle, site, &argument, [](Machine&, Lane* const* all) {
    for (int i = 0; i < 32; ++i) {
      Argument* to = static_cast<Argument*>(all[i]->argument);
      to->result = static_cast<const Argument*>(all[(i ^ to->lanes) % 32]->argument)->x;
    }
  });
  return argument.result;
}

template <typename V>
V load_shared(int offset, Site site = Site::here()) {
  static_assert(sizeof(V) % 4 == 0, "the shadow is by words");
  V x;
  memset(&x, 0xff, sizeof(V));
  if (!machine.shared.inside(offset, sizeof(V), site, machine.self->thread)) return x;
  machine.shared.read(offset, sizeof(V), machine.now(), false, site);
  machine.log(Access::kSharedLoad, offset, sizeof(V), site);
  memcpy(&x, machine.shared.at(offset), sizeof(V));
  return x;
}
template <typename V>
void store_shared(int offset, V x, Site site = Site::here()) {
  static_assert(sizeof(V) % 4 == 0, "the shadow is by words");
  if (!machine.shared.inside(offset, sizeof(V), site, machine.self->thread)) return;
  machine.shared.write(offset, sizeof(V), machine.now(), site);
  machine.log(Access::kSharedStore, offset, sizeof(V), site);
  memcpy(machine.shared.at(offset), &x, sizeof(V));
}

template <typename V>
V load_global(const V* from, Site site = Site::here()) {
  V x;
  memset(&x, 0xff, sizeof(V));
  if (!machine.global.read(from, sizeof(V), site, machine.self->thread)) return x;
  machine.log(Access::kGlobalLoad, reinterpret_cast<uintptr_t>(from), sizeof(V), site);
  memcpy(&x, from, sizeof(V));
  return x;
}
template <typename V>
void store_global(V* to, V x, Site site = Site::here()) {
  if (!machine.global.write(to, sizeof(V), site, machine.self->thread)) return;
  machine.log(Access::kGlobalStore, reinterpret_cast<uintptr_t>(to), sizeof(V), site);
  memcpy(to, &x, sizeof(V));
}

inline void copy_async16(int offset, const void* from, bool live, Site site = Site::here()) {
  const uint32_t thread = machine.self->thread;
  if (!machine.shared.inside(offset, 16, site, thread)) return;
  if (live && !machine.global.read(from, 16, site, thread)) return;
  machine.shared.depart(offset, 16, machine.now(), site);
  ++machine.counts.copies;
  emulation::Copy copy = {offset, -1, from, live, site, {}, false};
  const emulation::Landing landing = machine.settings.landing;
  copy.read = landing == emulation::Landing::kAtIssue ||
              (landing == emulation::Landing::kRandom && machine.chance());
  if (copy.read && live) memcpy(copy.data, from, 16);
  machine.self->copies.push_back(copy);
}
inline void copy_commit() {
  Lane& lane = *machine.self;
  for (auto copy = lane.copies.rbegin(); copy != lane.copies.rend() && copy->group < 0; ++copy) {
    copy->group = lane.groups;
  }
  ++lane.groups;
}
template <int kPending>
void copy_wait() {
  Lane& lane = *machine.self;
  size_t kept = 0;
  for (emulation::Copy& copy : lane.copies) {
    if (copy.group < 0 || copy.group >= lane.groups - kPending) {
      lane.copies[kept++] = copy;
      continue;
    }
    if (!copy.read && copy.live) memcpy(copy.data, copy.from, 16);
    memcpy(machine.shared.at(copy.offset), copy.data, 16);
    machine.shared.land(copy.offset, 16, machine.now());
  }
  lane.copies.resize(kept);
}

// The lanes of each matrix give the addresses of its rows; lane i gets columns 2 (i % 4) and the
// next of row i / 4, or of the transpose.
template <int kMatrices, bool kTransposed>
void load_matrices(uint32_t* r, int offset, Site site) {
  struct Argument {
    uint32_t* r;
    int offset;
    Site site;
  } argument = {r, offset, site};
  const Meeting meeting = kTransposed ? Meeting::kTransposed : Meeting::kMatrices;
  machine.meet_warp(meeting, site, &argument, [](Machine& m, Lane* const* all) {
    const Site at = static_cast<const Argument*>(all[0]->argument)->site;
    Lane* const self = m.self;
    emulation::Traffic traffic;
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      uint16_t elements[8][8];
      int in_bank[8] = {};  // rows by the sixteen bytes of all banks that they lie in
      for (int row = 0; row < 8; ++row) {
        m.self = all[8 * matrix + row];
        const int from = static_cast<const Argument*>(m.self->argument)->offset;
        memset(elements[row], 0xff, 16);
        if (!m.shared.inside(from, 16, at, m.self->thread)) continue;
        m.shared.read(from, 16, m.now(), true, at);
        memcpy(elements[row], m.shared.at(from), 16);
        ++in_bank[from / 16 % 8];
      }
      traffic.cost += *std::max_element(in_bank, in_bank + 8);
      traffic.ideal += 1;
      for (int i = 0; i < 32; ++i) {
        const int row = i / 4, column = i % 4 * 2;
        const uint32_t low = kTransposed ? elements[column][row] : elements[row][column];
        const uint32_t high = kTransposed ? elements[column + 1][row] : elements[row][column + 1];
        static_cast<Argument*>(all[i]->argument)->r[matrix] = low | high << 16;
      }
    }
    m.self = self;
    m.count_matrices(kMatrices, traffic, at);
  });
}
inline void load_matrices4(uint32_t (&r)[4], int offset, Site site = Site::here()) {
  load_matrices<4, false>(r, offset, site);
}
inline void load_matrices4_transposed(uint32_t (&r)[4], int offset, Site site = Site::here()) {
  load_matrices<4, true>(r, offset, site);
}
inline void load_matrices2_transposed(uint32_t (&r)[2], int offset, Site site = Site::here()) {
  load_matrices<2, true>(r, offset, site);
}

// c [16 8] += a [16 16] b [16 8]. Lane i holds row i / 4 and, behind, row i / 4 + 8 of a and c, and
// column i / 4 of b; of each the two elements from 2 (i % 4) on.
template <typename T>
void multiply_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                    Site site = Site::here()) {
  struct Argument {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } argument = {c, a, {b0, b1}};
  machine.meet_warp(Meeting::kProduct, site, &argument, [](Machine& m, Lane* const* all) {
    typedef float Row __attribute__((vector_size(32)));
    const auto low = [](uint32_t x) { return widen(T{static_cast<uint16_t>(x)}); };
    const auto high = [](uint32_t x) { return widen(T{static_cast<uint16_t>(x >> 16)}); };
    float left[16][16];
    Row right[16], sum[16];
    for (int i = 0; i < 32; ++i) {
      const Argument& lane = *static_cast<const Argument*>(all[i]->argument);
      const int row = i / 4, column = i % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        for (int side = 0; side < 2; ++side) {
          left[row + 8 * half][column + 8 * side] = low(lane.a[half + 2 * side]);
          left[row + 8 * half][column + 8 * side + 1] = high(lane.a[half + 2 * side]);
        }
        right[column + 8 * half][row] = low(lane.b[half]);
        right[column + 8 * half + 1][row] = high(lane.b[half]);
        sum[row + 8 * half][column] = lane.c[2 * half];
        sum[row + 8 * half][column + 1] = lane.c[2 * half + 1];
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) sum[row] += left[row][k] * right[k];
    }
    for (int i = 0; i < 32; ++i) {
      float* to = static_cast<Argument*>(all[i]->argument)->c;
      for (int j = 0; j < 4; ++j) to[j] = sum[i / 4 + j / 2 * 8][i % 4 * 2 + j % 2];
    }
    ++m.counts.products;
  });
}

inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
inline float exp2_fast(float x) { return flush(exp2f(x)); }
inline float log2_fast(float x) { return log2f(flush(x)); }
inline float reciprocal_fast(float x) { return flush(1.0f / flush(x)); }

template <typename T>
uint32_t pack2(float low, float high) {
  return emulation::narrow<T>(low).bits | static_cast<uint32_t>(emulation::narrow<T>(high).bits)
                                              << 16;
}

inline int shared_limit() { return machine.settings.shared_limit; }
// An H100, but for tests that need a device filled by few blocks.
#ifndef SIMT_PROCESSORS
#define SIMT_PROCESSORS 132
#endif
inline int device_processors() { return SIMT_PROCESSORS; }
inline int device_capability() { return 90; }
inline const char* device_error_name(int) { return "the block was given up"; }
template <typename Kernel, typename Params>
int kernel_trouble() {
  return 0;
}

// 0, or 1 if the block was given up, which was reported.
template <typename Kernel, typename Params>
int launch(Grid grid, int shared_bytes, void*, const Params& params) {
  const auto body = [](const void* argument) {
    Kernel::run(*static_cast<const Params*>(argument));
  };
  return machine.run(grid.x, grid.y, grid.z, Kernel::kThreads, shared_bytes, body, &params) ? 0 : 1;
}

}  // namespace SIMT_BACKEND
}  // namespace snoopi
