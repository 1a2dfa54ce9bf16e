// The parts specific to one module: its name, its library's name, and the choice of CPU twin or
// CUDA kernel for a tensor. Compiled once for each of _C, _emu and _emu_check; the modules share
// all other objects of csrc/ops.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "ops/settings.h"
#include "ops/stream.h"
#ifdef LX_EMULATE
#include "emu/emu.h"
#endif

#define LX_STRING_(x) #x
#define LX_STRING(x) LX_STRING_(x)

namespace lora_ext {

#ifdef LX_EMULATE
bool launches_kernels(const at::Tensor&) {
    return true;
}

void* current_stream(const at::Tensor&) {
    return nullptr;
}
#else
bool launches_kernels(const at::Tensor& t) {
    return t.is_cuda();
}

// c10's virtual guard works for any backend without a CUDA header, so this file also compiles
// against a CPU-only torch.
void* current_stream(const at::Tensor& t) {
    const c10::impl::VirtualGuardImpl guard(t.device().type());
    return guard.getStream(t.device()).native_handle();
}
#endif

bool has_kernels() {
#ifdef LORA_EXT_WITH_CUDA
    return true;
#else
    return false;
#endif
}

namespace {

// Registration runs when the library is loaded, by a Python import or by torch.ops.load_library.
const bool registered = (register_ops(LX_STRING(LORA_EXT_LIBRARY)), true);

}  // namespace
}  // namespace lora_ext

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    lora_ext::define_ops(m);
#ifdef LX_EMULATE
    m.def("set_seed", &lx::emu::set_seed);
    m.def("set_shared_memory", &lx::emu::set_shared_memory);
    m.def("launches", [] { return lx::emu::counters().launches; });
#endif
}
