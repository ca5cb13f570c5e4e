// A few calls on tensors of exactly their size, for address and undefined-behaviour sanitizers.
// They see what the emulation's own checks do not: raw accesses, and arrays in registers.
#include <math.h>
#include <stdio.h>

#include <vector>

#include "../cuda/simt.h"
#include "nasa_emu.h"

namespace snoopi {
namespace {

// Elements that repeat after a prime number of steps.
template <typename T>
struct Tensor {
  std::vector<T> data;
  explicit Tensor(int64_t size) : data(size) {
    for (int64_t i = 0; i < size; ++i) {
      const float x = static_cast<float>(i * 37 % 101 - 50) / 50.0f;
      if constexpr (sizeof(T) == 4)
        data[i] = x;
      else
        data[i] = emulation::narrow<T>(x);
    }
  }
};

// One head of m queries, texts of n and n + 1 tokens, the first masked here and there.
template <typename T>
int call(int dtype, int d, int64_t m, int64_t n, int64_t c_out) {
  const Tensor<T> q(m * d), k(n * d), v(n * d), other_k((n + 1) * d), other_v((n + 1) * d);
  const Tensor<T> w(c_out * d), bias(c_out);
  std::vector<uint8_t> mask(n, 1);
  for (int64_t i = 0; i < n; i += 3) mask[i] = 0;
  std::vector<float> strength(m, 0.7f), lse(m), other_lse(m);
  std::vector<T> out(m * (c_out > 0 ? c_out : d));
  NasaParams p = {};
  p.q = q.data.data();
  p.q_stride[0] = m * d;
  p.q_stride[1] = p.q_stride[2] = d;
  p.b = p.h = 1;
  p.m = m;
  p.num_texts = 2;
  p.texts[0] = {k.data.data(), v.data.data(), mask.data(), n, {n * d, d, d}, {n * d, d, d}, n};
  p.texts[1] = {other_k.data.data(), other_v.data.data(), nullptr, n + 1, {0, d, d}, {0, d, d}, 0};
  p.softmax_scale = 0.3f;
  p.strength = strength.data();
  p.strength_stride[1] = 1;
  p.out[0] = out.data();
  p.lse[0] = lse.data();
  p.lse[1] = other_lse.data();
  if (c_out > 0) {
    p.w_out = w.data.data();
    p.b_out = bias.data.data();
    p.c_out = c_out;
  }
  const int error = snoopi_nasa_emulated(&p, dtype, d, nullptr);
  for (const emulation::Report& report : emulation::machine.reports.list()) {
    printf("%s at %s: %s\n", name(report.fault), report.site.str().c_str(), report.detail.c_str());
  }
  printf("d=%d m=%d n=%d c_out=%d: %s\n", d, static_cast<int>(m), static_cast<int>(n),
         static_cast<int>(c_out), snoopi_nasa_emulated_error(error));
  return error != kOk || !emulation::machine.reports.list().empty();
}

}  // namespace
}  // namespace snoopi

int main() {
  using namespace snoopi;
  constexpr int kDim = NASA_ONLY_DIM;
  int failures = 0;
  for (const int n : {1, 77, 130}) {
    failures += call<BFloat16>(kBFloat16, kDim, 37, n, 0);
    failures += call<Half>(kHalf, kDim, 17, n, 9);
    failures += call<float>(kFloat, kDim, 65, n, 0);
  }
  return failures;
}
