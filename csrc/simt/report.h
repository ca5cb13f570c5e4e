// What the emulation reports and counts.
#pragma once

#include <stdint.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

namespace snoopi {
namespace emulation {

// Where a primitive was called; a default argument of every primitive.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const { return file == other.file && line == other.line; }
  bool operator!=(const Site& other) const { return !(*this == other); }
  std::string str() const {
    const std::string path = file;
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
  }
};

enum class Fault {
  kHazard,           // shared memory touched by two threads with nothing that orders them
  kUninitialised,    // shared memory read that nobody wrote
  kCopyTooEarly,     // touched while an asynchronous copy to it was on its way
  kCopyUncommitted,  // an asynchronous copy that belongs to no group at the end
  kCopyInFlight,     // an asynchronous copy that nobody waited for
  kSharedBounds,
  kSharedAlignment,
  kGlobalBounds,
  kGlobalAlignment,
  kWrittenTwice,
  kNotWritten,
  kDivergent,  // threads that should meet are at different places
  kDeadlock,   // threads wait for others that never come
};

inline const char* name(Fault fault) {
  static const char* const names[] = {
      "hazard",        "uninitialised",    "copy too early", "copy uncommitted", "copy in flight",
      "shared bounds", "shared alignment", "global bounds",  "global alignment", "written twice",
      "not written",   "divergent",        "deadlock"};
  return names[static_cast<int>(fault)];
}

struct Report {
  Fault fault;
  Site site;
  std::string detail;  // of the first occurrence
  int64_t count;
};

// One report for every kind of fault and place.
class Reports {
 public:
  template <typename Detail>  // () -> std::string, made for the first occurrence only
  void add(Fault fault, Site site, const Detail& detail) {
    for (Report& report : list_) {
      if (report.fault == fault && report.site == site) {
        ++report.count;
        return;
      }
    }
    list_.push_back({fault, site, detail(), 1});
  }
  const std::vector<Report>& list() const { return list_; }
  void clear() { list_.clear(); }

 private:
  std::vector<Report> list_;
};

// Waves: turns that shared memory takes to serve the requests; ideal: without bank conflicts.
// Sectors: pieces of 32 bytes of global memory that the requests touch; ideal: their bytes over 32.
struct Traffic {
  int64_t cost = 0, ideal = 0;
};

struct Counts {
  int64_t products = 0;  // m16n8k16
  int64_t matrices = 0;  // 8 x 8, loaded
  int64_t barriers = 0;  // of a block
  int64_t copies = 0;    // asynchronous, 16 bytes each
  int64_t switches = 0;
  Traffic shared, loads, stores;
  std::map<std::pair<std::string, std::string>, Traffic> sites;  // by (what, where)
};

}  // namespace emulation
}  // namespace snoopi
