// Reuses the memory of large, short-lived CPU results, because the operating system takes longer to
// provide new memory than the op takes to write its result.
#pragma once

#include "ops/call.h"

namespace lora_ext {

// Return an uninitialised tensor. On the CPU its memory returns to a list when the last tensor on
// it is destroyed, and the next tensor of similar size reuses it. The list holds at most 128 MiB.
Tensor reused_memory(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace lora_ext
