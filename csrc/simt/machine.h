// One block of threads at a time: fibers that run until they must wait for others, in a chosen
// order.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "fiber.h"
#include "memory.h"
#include "report.h"

namespace snoopi {
namespace emulation {

enum class Order { kAscending, kDescending, kRandom };  // of threads, warps and blocks

// When an asynchronous copy reads its source: at the latest or the earliest moment, or either.
enum class Landing { kAtWait, kAtIssue, kRandom };

struct Settings {
  Order order = Order::kAscending;
  Landing landing = Landing::kAtWait;
  uint64_t seed = 0;
  bool count = true;              // traffic; costs a third of the time
  int shared_limit = 227 * 1024;  // of a block, in bytes
};

struct Copy {
  int offset, group;  // group -1: not committed
  const void* from;
  bool live;
  Site site;
  unsigned char data[16];
  bool read;  // data holds what was there at the issue
};

struct Access {
  enum Space : uint8_t { kSharedLoad, kSharedStore, kGlobalLoad, kGlobalStore } space;
  uint8_t bytes;
  Site site;
  uint64_t address;
  bool same_request(const Access& other) const {
    return space == other.space && bytes == other.bytes && site == other.site;
  }
};

enum class Meeting { kNone, kBlockSync, kWarpSync, kShuffle, kProduct, kMatrices, kTransposed };

struct Lane {
  fibers::Fiber fiber;
  uint32_t thread = 0;
  bool done = false;
  Meeting meeting = Meeting::kNone;  // that it waits at
  Site site = {"", 0};
  void* argument = nullptr;
  std::vector<Copy> copies;
  int groups = 0;  // committed
  std::vector<Access> log;
};

struct Warp {
  uint32_t runnable = 0, waiting = 0;  // lanes; those that wait for the block are in neither
  uint32_t syncs = 0;
};

class Machine {
 public:
  Reports reports;
  Counts counts;
  Settings settings;
  SharedMemory shared{reports};
  GlobalMemory global{reports};
  int block[3] = {0, 0, 0};
  Lane* self = nullptr;  // that runs

  // Runs `body(argument)` by every thread of every block. False if it was given up.
  bool run(unsigned x, unsigned y, unsigned z, int threads, int shared_bytes,
           void (*body)(const void*), const void* argument) {
    body_ = body;
    argument_ = argument;
    random_.seed(settings.seed);
    std::vector<uint64_t> blocks(static_cast<uint64_t>(x) * y * z);
    for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
    if (settings.order == Order::kDescending) std::reverse(blocks.begin(), blocks.end());
    if (settings.order == Order::kRandom) std::shuffle(blocks.begin(), blocks.end(), random_);
    for (const uint64_t i : blocks) {
      block[0] = static_cast<int>(i % x);
      block[1] = static_cast<int>(i / x % y);
      block[2] = static_cast<int>(i / x / y);
      if (!run_block(threads, shared_bytes)) return false;
    }
    return true;
  }

  Moment now() const { return {self->thread, barriers_, warps_[self->thread / 32].syncs}; }

  // Waits for the rest of the warp; the last to come does `work` on all lanes' arguments.
  void meet_warp(Meeting meeting, Site site, void* argument, void (*work)(Machine&, Lane* const*)) {
    Warp& warp = warps_[self->thread / 32];
    const uint32_t bit = 1u << self->thread % 32;
    self->meeting = meeting;
    self->site = site;
    self->argument = argument;
    warp.runnable &= ~bit;
    warp.waiting |= bit;
    if (warp.waiting != ~0u) {
      go_on();
      return;
    }
    Lane* lanes[32];
    for (int i = 0; i < 32; ++i) lanes[i] = lanes_[self->thread / 32 * 32 + i].get();
    for (const Lane* lane : lanes) {
      if (lane->meeting == meeting && lane->site == site) continue;
      reports.add(Fault::kDivergent, site, [&] {
        return "thread " + std::to_string(lane->thread) + " of its warp is at " + lane->site.str();
      });
      give_up();
    }
    if (meeting == Meeting::kWarpSync) ++warp.syncs;
    if (work != nullptr) work(*this, lanes);
    for (Lane* lane : lanes) lane->meeting = Meeting::kNone;
    warp.waiting = 0;
    warp.runnable = ~0u;
  }

  void meet_block(Site site) {
    self->meeting = Meeting::kBlockSync;
    self->site = site;
    warps_[self->thread / 32].runnable &= ~(1u << self->thread % 32);
    if (++at_barrier_ < static_cast<int>(lanes_in_use_)) {
      go_on();
      return;
    }
    for (uint32_t i = 0; i < lanes_in_use_; ++i) {
      if (lanes_[i]->site == site) continue;
      reports.add(Fault::kDivergent, site, [&] {
        return "thread " + std::to_string(i) + " is at the barrier at " + lanes_[i]->site.str();
      });
      give_up();
    }
    at_barrier_ = 0;
    ++barriers_;
    ++counts.barriers;
    for (uint32_t i = 0; i < lanes_in_use_; ++i) lanes_[i]->meeting = Meeting::kNone;
    for (uint32_t w = 0; w < lanes_in_use_ / 32; ++w) {
      warps_[w].runnable = ~0u;
      count_traffic(w);
    }
  }

  void log(Access::Space space, uint64_t address, size_t bytes, Site site) {
    if (!settings.count) return;
    self->log.push_back({space, static_cast<uint8_t>(bytes), site, address});
  }

  void count_matrices(int num, const Traffic& traffic, Site site) {
    counts.matrices += num;
    if (!settings.count) return;
    add(counts.shared, traffic);
    add(counts.sites[{"matrices", site.str()}], traffic);
  }

  bool chance() { return random_() % 2 == 0; }

 private:
  static void begin();

  bool run_block(int threads, int shared_bytes) {
    shared.reset(shared_bytes);
    lanes_in_use_ = threads;
    while (lanes_.size() < lanes_in_use_) lanes_.push_back(std::make_unique<Lane>());
    warps_.assign(threads / 32, Warp{~0u, 0, 0});
    at_barrier_ = 0;
    barriers_ = 0;
    given_up_ = false;
    for (uint32_t i = 0; i < lanes_in_use_; ++i) {
      Lane& lane = *lanes_[i];
      lane.fiber.start(begin);
      lane.thread = i;
      lane.done = false;
      lane.meeting = Meeting::kNone;
      lane.copies.clear();
      lane.groups = 0;
      lane.log.clear();
    }
    self = pick();
    self->fiber.enter(main_);
    if (given_up_) return false;
    if (!all_done()) return false;
    for (uint32_t w = 0; w < lanes_in_use_ / 32; ++w) count_traffic(w);
    return true;
  }

  bool all_done() {
    std::string waiting;
    Site first = {"", 0}, last = first;
    int num = 0;
    for (uint32_t i = 0; i < lanes_in_use_; ++i) {
      const Lane& lane = *lanes_[i];
      if (lane.done) continue;
      if (num++ == 0) first = lane.site;
      if (lane.site == last) continue;
      last = lane.site;
      waiting += ", thread " + std::to_string(i) + " at " + last.str();
    }
    if (num == 0) return true;
    reports.add(Fault::kDeadlock, first,
                [&] { return std::to_string(num) + " threads wait" + waiting; });
    return false;
  }

  // Lets another thread run, or the machine if none can.
  void go_on(bool last = false) {
    Lane* from = self;
    Lane* next = pick();
    ++counts.switches;
    if (next == nullptr) {
      main_.enter(from->fiber, last);
    } else {
      self = next;
      next->fiber.enter(from->fiber, last);
    }
    // Whoever came back here made this lane the running one.
  }

  [[noreturn]] void give_up() {
    given_up_ = true;
    main_.enter(self->fiber);
    abort();
  }

  Lane* pick() {
    const uint32_t num = static_cast<uint32_t>(warps_.size());
    const bool random = settings.order == Order::kRandom;
    const uint32_t first = random ? static_cast<uint32_t>(random_() % num) : 0;
    for (uint32_t i = 0; i < num; ++i) {
      uint32_t w = (first + i) % num;
      if (settings.order == Order::kDescending) w = num - 1 - w;
      const uint32_t lanes = warps_[w].runnable;
      if (lanes == 0) continue;
      int lane =
          settings.order == Order::kDescending ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes);
      if (random) {
        const uint32_t turn = static_cast<uint32_t>(random_() % 32);
        const uint32_t turned = lanes >> turn | lanes << (32 - turn) % 32;
        lane = static_cast<int>((__builtin_ctz(turned) + turn) % 32);
      }
      return lanes_[w * 32 + lane].get();
    }
    return nullptr;
  }

  void finish() {
    for (const Copy& copy : self->copies) {
      const Fault fault = copy.group < 0 ? Fault::kCopyUncommitted : Fault::kCopyInFlight;
      reports.add(fault, copy.site, [&] { return "thread " + std::to_string(self->thread); });
    }
    self->done = true;
    warps_[self->thread / 32].runnable &= ~(1u << self->thread % 32);
  }

  // The k-th access of each lane at one place since the last barrier is taken as one request.
  void count_traffic(uint32_t warp) {
    if (!settings.count) return;
    std::vector<Access>* logs[32];
    for (int i = 0; i < 32; ++i) logs[i] = &lanes_[warp * 32 + i]->log;
    std::vector<Access> request;
    std::vector<int> lanes;
    std::vector<size_t> taken(32, 0);
    std::vector<std::vector<bool>> used(32);
    for (int i = 0; i < 32; ++i) used[i].assign(logs[i]->size(), false);
    for (int i = 0; i < 32; ++i) {
      for (size_t k = 0; k < logs[i]->size(); ++k) {
        if (used[i][k]) continue;
        const Access& first = (*logs[i])[k];
        request.assign(1, first);
        lanes.assign(1, i);
        for (int j = i + 1; j < 32; ++j) {  // its next access of the kind that nobody has taken
          for (size_t l = taken[j]; l < logs[j]->size(); ++l) {
            if (used[j][l] || !first.same_request((*logs[j])[l])) continue;
            used[j][l] = true;
            while (taken[j] < used[j].size() && used[j][taken[j]]) ++taken[j];
            request.push_back((*logs[j])[l]);
            lanes.push_back(j);
            break;
          }
        }
        count_request(request, lanes);
      }
    }
    for (auto* log : logs) log->clear();
  }

  void count_request(const std::vector<Access>& request, const std::vector<int>& lanes) {
    const Access& first = request[0];
    const bool is_shared = first.space <= Access::kSharedStore;
    Traffic traffic;
    if (is_shared) {
      const int in_phase = std::min(32, 128 / first.bytes);  // lanes that are served together
      for (size_t i = 0; i < request.size();) {
        const int phase = lanes[i] / in_phase;
        std::vector<uint64_t> words;
        for (; i < request.size() && lanes[i] / in_phase == phase; ++i) {
          for (int byte = 0; byte < first.bytes; byte += 4) {
            words.push_back((request[i].address + byte) / 4);
          }
        }
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        int64_t in_bank[32] = {};
        for (const uint64_t word : words) ++in_bank[word % 32];
        traffic.cost += *std::max_element(in_bank, in_bank + 32);
        traffic.ideal += 1;
      }
    } else {
      std::vector<uint64_t> sectors;
      for (const Access& access : request) {
        sectors.push_back(access.address / 32);
        sectors.push_back((access.address + access.bytes - 1) / 32);
      }
      std::sort(sectors.begin(), sectors.end());
      sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
      traffic.cost = static_cast<int64_t>(sectors.size());
      traffic.ideal = (static_cast<int64_t>(request.size()) * first.bytes + 31) / 32;
    }
    static const char* const names[] = {"shared load", "shared store", "global load",
                                        "global store"};
    Traffic& total = is_shared                            ? counts.shared
                     : first.space == Access::kGlobalLoad ? counts.loads
                                                          : counts.stores;
    add(total, traffic);
    add(counts.sites[{names[first.space], first.site.str()}], traffic);
  }

  static void add(Traffic& to, const Traffic& traffic) {
    to.cost += traffic.cost;
    to.ideal += traffic.ideal;
  }

  void (*body_)(const void*) = nullptr;
  const void* argument_ = nullptr;
  std::mt19937_64 random_;
  fibers::Fiber main_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<Warp> warps_;
  uint32_t lanes_in_use_ = 0, barriers_ = 0;
  int at_barrier_ = 0;
  bool given_up_ = false;
};

inline Machine machine;

inline void Machine::begin() {
  machine.self->fiber.arrived();
  machine.body_(machine.argument_);
  machine.finish();
  machine.go_on(true);
  abort();  // a finished fiber is never gone on with
}

}  // namespace emulation
}  // namespace snoopi
