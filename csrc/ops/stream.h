// Which road a tensor takes, and the stream it takes it on. The one place that knows what a device
// is.
//
// c10's virtual guard answers for any backend without a CUDA header, so this file compiles beside a
// CPU-only torch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace lora_ext {

// True for tensors whose ops are kernel launches. In the emulated build every tensor is such a
// tensor.
inline bool launches_kernels([[maybe_unused]] const at::Tensor& t) {
#ifdef LX_EMULATE
    return true;
#else
    return t.is_cuda();
#endif
}

// The current stream of the tensor's device, as the cudaStream_t that launchers expect.
inline void* current_stream([[maybe_unused]] const at::Tensor& t) {
#ifdef LX_EMULATE
    return nullptr;
#else
    const c10::impl::VirtualGuardImpl guard(t.device().type());
    return guard.getStream(t.device()).native_handle();
#endif
}

}  // namespace lora_ext
