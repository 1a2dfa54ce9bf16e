// The only pybind11 file. Each op is one C++ function, reachable by two doors: the module itself,
// and the dispatcher, which is the one Python uses (torch.compile, fake tensors and autograd come
// with it). Both are made from ops/table.h.
#include <torch/extension.h>

#ifndef LORA_EXT_LIBRARY
#define LORA_EXT_LIBRARY lora_ext
#endif

#include "ops/settings.h"
#include "ops/table.h"
#ifdef LX_EMULATE
#include "emu/emu.h"
#endif

namespace {

using lora_ext::table::for_each_op;

// The function as part of the type: the dispatcher then calls it without a pointer.
template <auto kFunction>
constexpr auto fixed() {
    return c10::CompileTimeFunctionPointer<std::remove_pointer_t<decltype(kFunction)>, kFunction>();
}

template <class Library>
void implement(Library& m) {
    for_each_op([&]<class Row>(const Row& op) { m.impl(op.name, fixed<Row::kernel>()); });
}

template <c10::DeviceType kDevice, class Library>
void autocast(Library& m) {
    for_each_op([&]<class Row>(const Row& op) {
        if constexpr (requires { &Row::Formula::template autocast<kDevice>; })
            m.impl(op.name, fixed<&Row::Formula::template autocast<kDevice>>());
    });
}

}  // namespace

TORCH_LIBRARY(LORA_EXT_LIBRARY, m) {
    for_each_op([&]<class Row>(const Row& op) {
        m.def((std::string(op.name) + op.schema).c_str());
        lora_ext::autograd::Handle<Row::kernel>::name = op.name;
    });
}
TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, CPU, m) {
    implement(m);
}
TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, CUDA, m) {
    implement(m);
}
TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, Autograd, m) {
    for_each_op([&]<class Row>(const Row& op) {
        if constexpr (requires { Row::above; }) m.impl(op.name, fixed<Row::above>());
    });
}
TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, ADInplaceOrView, m) {
    for_each_op([&]<class Row>(const Row& op) {
        if constexpr (requires { Row::in_place; }) m.impl(op.name, fixed<Row::in_place>());
    });
}
TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, AutocastCPU, m) {
    autocast<c10::kCPU>(m);
}
TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, AutocastCUDA, m) {
    autocast<c10::kCUDA>(m);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() =
        "Kernels of lora_ext: every op as a function, the same that torch.ops.lora_ext holds.";
    for_each_op([&]<class Row>(const Row& op) { m.def(op.name, Row::kernel); });
    m.def("cpu_isa", &lora_ext::cpu_isa);
    m.def("set_cpu_isa", &lora_ext::set_cpu_isa);
    m.def("has_kernels", &lora_ext::has_kernels);
    m.def("set_debug", &lora_ext::set_debug);
#ifdef LX_EMULATE
    m.def("set_seed", &lx::emu::set_seed);
    m.def("set_shared_memory", &lx::emu::set_shared_memory);
    m.def("launches", [] { return lx::emu::counters().launches; });
#endif
}
