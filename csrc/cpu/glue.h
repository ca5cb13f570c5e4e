// What the ops' CPU implementations share. Single ATen headers only: torch/extension.h takes seven
// times as long to compile.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>

#include "capability.h"

namespace snoopi {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A type with no kernel of its own is computed in fp32.
inline at::ScalarType computing_type(at::ScalarType type) {
  return type == at::kDouble || type == at::kBFloat16 ? type : at::kFloat;
}

inline at::ScalarType accumulator(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// The tensor in `type` with unit stride in its last dim.
inline Tensor readable(const Tensor& x, at::ScalarType type) {
  const Tensor y = x.to(type);
  return y.stride(-1) == 1 || y.size(-1) == 1 ? y : y.contiguous();
}

inline Tensor bytes(at::IntArrayRef sizes) {
  return at::empty(sizes, at::TensorOptions(at::kByte));
}

// Calls run(begin, end) on the threads, for ranges that make up [0, count). A range has at least a
// million multiply-adds, or bytes, of `work` each: below, a thread costs more than it brings.
template <typename Run>
void parallel(int64_t count, int64_t work, const Run& run) {
  constexpr int64_t kWorkOfARange = 1000000;
  const int64_t grain = std::max<int64_t>(kWorkOfARange / std::max<int64_t>(work, 1), 1);
  at::parallel_for(0, count, grain, run);
}

// Memory for a kernel to work in, aligned as it wants.
inline std::unique_ptr<void, decltype(&std::free)> scratch_of(int64_t bytes) {
  const size_t size = static_cast<size_t>((bytes + 63) / 64 * 64);
  std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(64, size), &std::free);
  TORCH_CHECK(memory != nullptr, "snoopi: no memory for ", size, " bytes of scratch");
  return memory;
}

}  // namespace

// A weight [c_out c_in] as the kernel of `type` reads it (linear.cpp).
Tensor pack_weight(const Tensor& weight, at::ScalarType type);

}  // namespace snoopi
