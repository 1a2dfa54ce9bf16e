// Registers every op of ops/table.h in the dispatcher and as a function of the Python module. The
// Python functions call the dispatcher too, because torch.compile, fake tensors and autograd need
// it. module.cpp calls register_ops with the name of its library, and define_ops.
#include "bindings.h"

#include <torch/extension.h>

#include <list>

#include "ops/settings.h"
#include "ops/table.h"

namespace {

using lora_ext::table::for_each_op;
using torch::Library;

// Makes kFunction part of a type, so that the dispatcher calls it without a function pointer.
template <auto kFunction>
constexpr auto fixed() {
    return c10::CompileTimeFunctionPointer<std::remove_pointer_t<decltype(kFunction)>, kFunction>();
}

void implement(Library& m) {
    for_each_op([&]<class Row>(const Row& op) { m.impl(op.name, fixed<Row::kernel>()); });
}

template <c10::DeviceType kDevice>
void autocast(Library& m) {
    for_each_op([&]<class Row>(const Row& op) {
        if constexpr (requires { &Row::Formula::template autocast<kDevice>; })
            m.impl(op.name, fixed<&Row::Formula::template autocast<kDevice>>());
    });
}

void above(Library& m) {
    for_each_op([&]<class Row>(const Row& op) {
        if constexpr (requires { Row::above; }) m.impl(op.name, fixed<Row::above>());
    });
}

void in_place(Library& m) {
    for_each_op([&]<class Row>(const Row& op) {
        if constexpr (requires { Row::in_place; }) m.impl(op.name, fixed<Row::in_place>());
    });
}

}  // namespace

namespace lora_ext {

// Does the work of TORCH_LIBRARY and TORCH_LIBRARY_IMPL for a library name given at run time.
void register_ops(const char* library) {
    static std::list<Library> kept;  // an op stays registered while its Library object exists
    Library& ops = kept.emplace_back(Library::DEF, library, std::nullopt, __FILE__, __LINE__);
    autograd::library = library;
    for_each_op([&]<class Row>(const Row& op) {
        ops.def((std::string(op.name) + op.schema).c_str());
        autograd::Handle<Row::kernel>::name = op.name;
    });
    const std::initializer_list<std::pair<c10::DispatchKey, void (*)(Library&)>> tables{
        {c10::DispatchKey::CPU, implement},
        {c10::DispatchKey::CUDA, implement},
        {c10::DispatchKey::Autograd, above},
        {c10::DispatchKey::ADInplaceOrView, in_place},
        {c10::DispatchKey::AutocastCPU, autocast<c10::kCPU>},
        {c10::DispatchKey::AutocastCUDA, autocast<c10::kCUDA>},
    };
    for (const auto& [key, fill] : tables)
        fill(kept.emplace_back(Library::IMPL, library, key, __FILE__, __LINE__));
}

void define_ops(pybind11::module_& m) {
    m.doc() = "Ops of lora_ext as functions, the same as in torch.ops.lora_ext.";
    // The functions call the dispatcher, like torch.ops, but convert arguments by their types in
    // C++, which saves half the time of a small op. They also release the GIL.
    for_each_op([&]<class Row>(const Row& op) {
        m.def(op.name, &autograd::Handle<Row::kernel>::call,
              pybind11::call_guard<pybind11::gil_scoped_release>());
    });
    m.def("is_plain_product", &is_plain_product);
    m.def("same_bits", &same_bits);
    m.def("cpu_isa", &cpu_isa);
    m.def("set_cpu_isa", &set_cpu_isa);
    m.def("has_kernels", &has_kernels);
    m.def("set_debug", &set_debug);
}

}  // namespace lora_ext
