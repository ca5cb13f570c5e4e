// The emulation's settings from a Python dictionary.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "machine.h"

namespace snoopi {
namespace emulation {

// {order: ascending | descending | random, landing: wait | issue | random, seed, count,
// shared_limit}; forgets all earlier reports, counts and tensors.
inline void start(const pybind11::dict& given) {
  Settings settings;
  for (const auto& [key, value] : given) {
    const std::string name = key.cast<std::string>();
    if (name == "order" || name == "landing") {
      const std::string word = value.cast<std::string>();
      if (word == "ascending")
        settings.order = Order::kAscending;
      else if (word == "descending")
        settings.order = Order::kDescending;
      else if (word == "wait")
        settings.landing = Landing::kAtWait;
      else if (word == "issue")
        settings.landing = Landing::kAtIssue;
      else if (word == "random" && name == "order")
        settings.order = Order::kRandom;
      else if (word == "random")
        settings.landing = Landing::kRandom;
      else
        throw pybind11::value_error(name + " cannot be " + word);
    } else if (name == "seed") {
      settings.seed = value.cast<uint64_t>();
    } else if (name == "count") {
      settings.count = value.cast<bool>();
    } else if (name == "shared_limit") {
      settings.shared_limit = value.cast<int>();
    } else {
      throw pybind11::key_error("no setting is called " + name);
    }
  }
  machine.settings = settings;
  machine.reports.clear();
  machine.counts = {};
  machine.global.clear();
}

}  // namespace emulation
}  // namespace snoopi
