// Choice between CUDA kernels and CPU twins for a tensor, and the current stream of its device.
// Each extension module implements both functions in module.cpp.
#pragma once

#include <ATen/core/Tensor.h>

namespace lora_ext {

// Return whether ops on t launch kernels. In the emulated build this is true for every tensor.
bool launches_kernels(const at::Tensor& t);

// Return the current stream of the tensor's device, as the cudaStream_t that launchers expect.
void* current_stream(const at::Tensor& t);

}  // namespace lora_ext
