#include "capability.h"

#include <ATen/Version.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace snoopi {
namespace {

enum Level { kDefault, kAVX2, kAVX512, kAVX512BF16, kAMX };

#if defined(__x86_64__)

struct Registers {
  unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r = {};
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool has_avx512_bf16() { return (cpuid(7, 1).a & 1u << 5) != 0; }

// The system keeps the tiles' registers, and lets this process use them.
bool may_use_amx() {
#if defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kBF16 = 1u << 22;
  if ((cpuid(7, 0).d & (kTile | kBF16)) != (kTile | kBF16)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The most that ONEDNN_MAX_CPU_ISA allows; of no use to us are the levels between these.
Level onednn_limit() {
  const char* set = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (set == nullptr) return kAMX;
  std::string name = set;
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  const auto begins = [&](const char* with) { return name.rfind(with, 0) == 0; };
  if (begins("AVX512_CORE_AMX") || name == "ALL" || name == "DEFAULT") return kAMX;
  if (begins("AVX512_CORE_BF16") || begins("AVX512_CORE_FP16") || begins("AVX10")) {
    return kAVX512BF16;
  }
  if (begins("AVX512_CORE")) return kAVX512;
  if (begins("AVX2")) return kAVX2;
  return begins("SSE") || begins("AVX") ? kDefault : kAMX;
}

// torch's choice of vectors, so that ATEN_CPU_CAPABILITY holds for this op as well.
Level vectors() {
  const std::string chosen = at::get_cpu_capability();
  const Level level = chosen == "AVX512" ? kAVX512 : chosen == "AVX2" ? kAVX2 : kDefault;
  return std::min(level, onednn_limit());
}

const Kernels& at_level(Level level) {
  switch (level) {
    case kAVX2:
      return kernels_avx2;
    case kAVX512:
      return kernels_avx512;
    case kAVX512BF16:
      return kernels_avx512_bf16;
    case kAMX:
      return kernels_amx;
    default:
      return kernels_default;
  }
}

#else

Level vectors() { return kDefault; }
const Kernels& at_level(Level) { return kernels_default; }

#endif

struct Choice {
  Kernels kernels;
  std::string name;
};

Choice choose() {
  constexpr std::array<const char*, 3> kNames = {"DEFAULT", "AVX2", "AVX512"};
  const Level level = vectors();
  Choice choice = {at_level(level), kNames[level]};
#if defined(__x86_64__)
  if (level != kAVX512) return choice;
  const Level limit = onednn_limit();
  if (limit >= kAMX && may_use_amx() && kernels_amx.bf16.works()) {
    choice.kernels.bf16 = kernels_amx.bf16;
    choice.name += ", bf16 by AMX";
  } else if (limit >= kAVX512BF16 && has_avx512_bf16()) {
    choice.kernels.bf16 = kernels_avx512_bf16.bf16;
    choice.name += ", bf16 by AVX512_BF16";
  }
#endif
  return choice;
}

const Choice& choice() {
  static const Choice made = choose();
  return made;
}

}  // namespace

const Kernel& kernel_for(at::ScalarType type) {
  const Kernels& kernels = choice().kernels;
  if (type == at::kDouble) return kernels.f64;
  return type == at::kBFloat16 ? kernels.bf16 : kernels.f32;
}

const std::string& capability() { return choice().name; }

}  // namespace snoopi
