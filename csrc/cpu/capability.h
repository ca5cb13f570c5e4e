// Which kernels this processor runs.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "kernels.h"

namespace snoopi {

// The kernel for tensors of a computing type (fp32, bf16, fp64). Chosen once per process, by
// torch's own switches (ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA) and by what the processor does.
const Kernel& kernel_for(at::ScalarType type);

// The choice in words: "AVX512, bf16 by AMX".
const std::string& capability();

}  // namespace snoopi
