// The only pybind11 file. Each op is one C++ function, reachable by two doors: the module itself,
// and the dispatcher, which is the one Python uses (torch.compile, fake tensors and autograd come
// with it).
#include <torch/extension.h>

#include "ops/lora.h"
#ifdef LX_EMULATE
#include "emu/emu.h"
#endif

#ifndef LORA_EXT_LIBRARY
#define LORA_EXT_LIBRARY lora_ext
#endif

namespace {

// The end of every signature.
#define LX_ADAPTERS "Tensor? ranks=None, Tensor? page_table=None, Tensor? plan=None"

template <class Library>
void implement(Library& m) {
    m.impl("lora_plan", &lora_ext::lora_plan);
    m.impl("lora_segment_ids", &lora_ext::lora_segment_ids);
    m.impl("lora_shrink", &lora_ext::lora_shrink);
    m.impl("lora_expand_", &lora_ext::lora_expand_);
    m.impl("lora_apply", &lora_ext::lora_apply);
    m.impl("lora_apply_", &lora_ext::lora_apply_);
}

}  // namespace

TORCH_LIBRARY(LORA_EXT_LIBRARY, m) {
    m.def("lora_plan(Tensor adapter_ids, int num_adapters, Tensor? num_valid=None) -> Tensor");
    m.def("lora_segment_ids(Tensor seg_indptr, Tensor seg_adapter, int num_tokens) -> Tensor");
    m.def("lora_shrink(Tensor x, Tensor a, Tensor adapter_ids, Tensor? scale=None, " LX_ADAPTERS
          ") -> Tensor");
    m.def("lora_expand_(Tensor(a!) y, Tensor v, Tensor b, Tensor adapter_ids, " LX_ADAPTERS
          ") -> ()");
    m.def(
        "lora_apply(Tensor x, Tensor a, Tensor b, Tensor adapter_ids, Tensor? "
        "scale=None, " LX_ADAPTERS ") -> Tensor");
    m.def(
        "lora_apply_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor adapter_ids, "
        "Tensor? scale=None, " LX_ADAPTERS ") -> ()");
}

TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, CPU, m) {
    implement(m);
}
TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, CUDA, m) {
    implement(m);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() =
        "Kernels of lora_ext: every op as a function, the same that torch.ops.lora_ext holds.";
    m.def("lora_plan", &lora_ext::lora_plan);
    m.def("lora_segment_ids", &lora_ext::lora_segment_ids);
    m.def("lora_shrink", &lora_ext::lora_shrink);
    m.def("lora_expand_", &lora_ext::lora_expand_);
    m.def("lora_apply", &lora_ext::lora_apply);
    m.def("lora_apply_", &lora_ext::lora_apply_);
    m.def("cpu_isa", &lora_ext::cpu_isa);
    m.def("set_cpu_isa", &lora_ext::set_cpu_isa);
    m.def("has_kernels", &lora_ext::has_kernels);
    m.def("set_debug", &lora_ext::set_debug);
#ifdef LX_EMULATE
    m.def("set_seed", &lx::emu::set_seed);
    m.def("launches", [] { return lx::emu::counters().launches; });
#endif
}
