// Each op is one C++ function, reachable by two doors: the module itself, and the dispatcher, which
// is the one Python uses (torch.compile, fake tensors and autograd come with it). Both are made
// from ops/table.h, here and nowhere else; module.cpp opens them under the name of its module.
#include "bindings.h"

#include <torch/extension.h>

#include <list>

#include "ops/settings.h"
#include "ops/table.h"

namespace {

using lora_ext::table::for_each_op;
using torch::Library;

// The function as part of the type: the dispatcher then calls it without a pointer.
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

// What TORCH_LIBRARY and TORCH_LIBRARY_IMPL do, for a name that this file does not know.
void register_ops(const char* library) {
    static std::list<Library> kept;  // an op is known for as long as its Library lives
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
    m.doc() =
        "Kernels of lora_ext: every op as a function, the same that torch.ops.lora_ext holds.";
    for_each_op([&]<class Row>(const Row& op) { m.def(op.name, Row::kernel); });
    m.def("cpu_isa", &cpu_isa);
    m.def("set_cpu_isa", &set_cpu_isa);
    m.def("has_kernels", &has_kernels);
    m.def("set_debug", &set_debug);
}

}  // namespace lora_ext
