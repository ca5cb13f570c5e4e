// The emulated shared memory with its shadow, and the global memory that a kernel may touch.
#pragma once

#include <stdint.h>
#include <string.h>

#include <string>
#include <vector>

#include "report.h"

namespace snoopi {
namespace emulation {

// When something happened, as the thread that did it sees it. Two accesses by different threads are
// ordered if a barrier of the block lies between, or, within a warp, a warp_sync. Nothing else
// orders them: not a shuffle, a product or a matrix load, though all of them make a warp meet.
struct Moment {
  uint32_t thread;
  uint32_t barriers;  // that the block has passed
  uint32_t syncs;     // that the thread's warp has passed
};

// Four bytes of shared memory: who wrote them last, and who read them since.
struct Cell {
  Moment write, read;
  enum : uint8_t { kNobody, kThread, kWarp, kBlock } readers;  // one, of one warp, of several warps
  bool written, in_flight;
};

class SharedMemory {
 public:
  explicit SharedMemory(Reports& reports) : reports_(reports) {}

  void reset(int bytes) {
    // A NaN in every format, and an improbable index.
    bytes_.assign((bytes + 3) / 4 * 4, 0xff);
    cells_.assign((bytes + 3) / 4, Cell{});
    size_ = bytes;
  }

  bool inside(int offset, int bytes, Site site, uint32_t thread) {
    if (offset < 0 || offset + bytes > size_) {
      reports_.add(Fault::kSharedBounds, site, [&] {
        return "thread " + std::to_string(thread) + ": " + std::to_string(bytes) + " bytes at " +
               std::to_string(offset) + " of " + std::to_string(size_);
      });
      return false;
    }
    if (offset % bytes != 0) {
      reports_.add(Fault::kSharedAlignment, site, [&] {
        return "thread " + std::to_string(thread) + ": " + std::to_string(bytes) + " bytes at " +
               std::to_string(offset);
      });
      return false;
    }
    return true;
  }

  // `whole_warp`: what is read goes to other lanes too.
  void read(int offset, int bytes, const Moment& now, bool whole_warp, Site site) {
    for (int i = offset / 4; i < (offset + bytes) / 4; ++i) {
      Cell& cell = cells_[i];
      if (cell.in_flight) {
        early(i, cell, now, "read", site);
      } else if (!cell.written) {
        reports_.add(Fault::kUninitialised, site, [&] { return where(i, now) + " is read"; });
      } else if (unordered(cell.write, now, whole_warp)) {
        reports_.add(Fault::kHazard, site, [&] {
          return where(i, now) + " reads what thread " + std::to_string(cell.write.thread) +
                 " wrote";
        });
      }
      note_reader(cell, now, whole_warp);
    }
  }

  void write(int offset, int bytes, const Moment& now, Site site) {
    for (int i = offset / 4; i < (offset + bytes) / 4; ++i) {
      Cell& cell = cells_[i];
      if (cell.in_flight) {
        early(i, cell, now, "overwritten", site);
        cell.in_flight = false;
      } else if (cell.written && unordered(cell.write, now, false)) {
        reports_.add(Fault::kHazard, site, [&] {
          return where(i, now) + " overwrites what thread " + std::to_string(cell.write.thread) +
                 " wrote";
        });
      } else if (unordered_to_readers(cell, now)) {
        reports_.add(Fault::kHazard, site, [&] {
          return where(i, now) + " overwrites what thread " + std::to_string(cell.read.thread) +
                 " reads";
        });
      }
      cell.write = now;
      cell.written = true;
      cell.readers = Cell::kNobody;
    }
  }

  // An asynchronous copy's beginning and end. What lies there in between is garbage.
  void depart(int offset, int bytes, const Moment& now, Site site) {
    write(offset, bytes, now, site);
    memset(at(offset), 0xff, bytes);
    for (int i = offset / 4; i < (offset + bytes) / 4; ++i) cells_[i].in_flight = true;
  }
  void land(int offset, int bytes, const Moment& now) {
    for (int i = offset / 4; i < (offset + bytes) / 4; ++i) {
      if (!cells_[i].in_flight) continue;  // overwritten in between, which was reported
      cells_[i].in_flight = false;
      cells_[i].write = now;
    }
  }

  unsigned char* at(int offset) { return bytes_.data() + offset; }

 private:
  static bool same_warp(const Moment& a, const Moment& b) { return a.thread / 32 == b.thread / 32; }

  static bool unordered(const Moment& then, const Moment& now, bool whole_warp) {
    if (then.barriers != now.barriers) return false;
    if (then.thread == now.thread && !whole_warp) return false;
    return !same_warp(then, now) || then.syncs == now.syncs;
  }

  static bool unordered_to_readers(const Cell& cell, const Moment& now) {
    if (cell.readers == Cell::kNobody || cell.read.barriers != now.barriers) return false;
    return cell.readers == Cell::kBlock || unordered(cell.read, now, cell.readers == Cell::kWarp);
  }

  // Keeps what later writers must be ordered to. Of a warp's readers those since its last sync
  // suffice: whoever is ordered to them is ordered to the earlier ones.
  static void note_reader(Cell& cell, const Moment& now, bool whole_warp) {
    const auto alone = whole_warp ? Cell::kWarp : Cell::kThread;
    if (cell.readers == Cell::kNobody || cell.read.barriers != now.barriers) {
      cell.readers = alone;
    } else if (cell.readers == Cell::kBlock || !same_warp(cell.read, now)) {
      cell.readers = Cell::kBlock;
    } else if (cell.read.syncs != now.syncs) {
      cell.readers = alone;
    } else if (cell.read.thread != now.thread || whole_warp) {
      cell.readers = Cell::kWarp;
    }
    cell.read = now;
  }

  void early(int i, const Cell& cell, const Moment& now, const char* what, Site site) {
    reports_.add(Fault::kCopyTooEarly, site, [&] {
      return where(i, now) + " is " + what + " before thread " + std::to_string(cell.write.thread) +
             " waited for its copy";
    });
  }

  static std::string where(int i, const Moment& now) {
    return "thread " + std::to_string(now.thread) + ": shared byte " + std::to_string(4 * i);
  }

  Reports& reports_;
  std::vector<unsigned char> bytes_;
  std::vector<Cell> cells_;
  int size_ = 0;
};

// The tensors of a call. Accesses outside of them are reported, if any was given at all; every
// element of an output must be written once.
class GlobalMemory {
 public:
  explicit GlobalMemory(Reports& reports) : reports_(reports) {}

  void clear() { ranges_.clear(); }

  void add_input(const char* name, const void* begin, size_t bytes) {
    ranges_.push_back({name, address(begin), address(begin) + bytes, 0, {}});
  }
  void add_output(const char* name, const void* begin, size_t bytes, size_t element) {
    std::vector<uint8_t> writes(bytes / element);
    ranges_.push_back({name, address(begin), address(begin) + bytes, element, std::move(writes)});
  }

  // Whether the access may be done.
  bool read(const void* from, size_t bytes, Site site, uint32_t thread) {
    return find(from, bytes, false, site, thread) != nullptr || ranges_.empty();
  }
  bool write(const void* to, size_t bytes, Site site, uint32_t thread) {
    Range* range = find(to, bytes, true, site, thread);
    if (range == nullptr) return ranges_.empty();
    const size_t first = (address(to) - range->begin) / range->element;
    for (size_t i = first; i < first + bytes / range->element; ++i) {
      if (range->writes[i] < 2 && ++range->writes[i] == 2) {
        reports_.add(Fault::kWrittenTwice, site, [&] {
          return "thread " + std::to_string(thread) + ": element " + std::to_string(i) + " of " +
                 range->name;
        });
      }
    }
    return true;
  }

  void check_all_written() {
    for (const Range& range : ranges_) {
      for (size_t i = 0; i < range.writes.size(); ++i) {
        if (range.writes[i] > 0) continue;
        reports_.add(Fault::kNotWritten, {range.name, 0}, [&] {
          return "element " + std::to_string(i) + " of " + range.name + " and maybe others";
        });
      }
    }
  }

 private:
  struct Range {
    const char* name;
    uintptr_t begin, end;
    size_t element;  // of an output; 0: input
    std::vector<uint8_t> writes;
  };

  static uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

  Range* find(const void* pointer, size_t bytes, bool output, Site site, uint32_t thread) {
    const uintptr_t begin = address(pointer);
    if (begin % bytes != 0) {
      reports_.add(Fault::kGlobalAlignment, site, [&] {
        return "thread " + std::to_string(thread) + ": " + std::to_string(bytes) + " bytes";
      });
    }
    for (Range& range : ranges_) {
      if (begin >= range.begin && begin + bytes <= range.end && (range.element > 0) == output) {
        return &range;
      }
    }
    if (!ranges_.empty()) {
      reports_.add(Fault::kGlobalBounds, site, [&] {
        return "thread " + std::to_string(thread) + (output ? " writes " : " reads ") +
               std::to_string(bytes) + " bytes" + nearest(begin);
      });
    }
    return nullptr;
  }

  std::string nearest(uintptr_t begin) const {
    for (const Range& range : ranges_) {
      if (begin + 4096 >= range.begin && begin < range.end + 4096) {
        const int64_t past = static_cast<int64_t>(begin - range.end);
        return ", " + std::to_string(past) + " past the end of " + range.name;
      }
    }
    return " far from any tensor";
  }

  Reports& reports_;
  std::vector<Range> ranges_;
};

}  // namespace emulation
}  // namespace snoopi
