// Results of the CPU ops that are large and short-lived, in memory that outlives them: fresh pages
// cost more than what is written to them.
#pragma once

#include "ops/call.h"

namespace lora_ext {

// An uninitialised tensor. On the CPU its memory goes back to a list when the last tensor on it
// dies, and the next one of about its size takes it from there; the list holds 128 MiB at most.
Tensor reused_memory(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace lora_ext
