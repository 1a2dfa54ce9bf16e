// Which road a tensor takes, and the stream it takes it on. module.cpp, the one place that knows
// what a device is, answers for its module.
#pragma once

#include <ATen/core/Tensor.h>

namespace lora_ext {

// True for tensors whose ops are kernel launches. In the emulated build every tensor is such a
// tensor.
bool launches_kernels(const at::Tensor& t);

// The current stream of the tensor's device, as the cudaStream_t that launchers expect.
void* current_stream(const at::Tensor& t);

}  // namespace lora_ext
