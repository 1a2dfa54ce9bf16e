// The only pybind11 file. Each op is one C++ function, reachable by two doors: the module itself,
// and the dispatcher, which is the one Python uses (torch.compile, fake tensors and autograd come
// with it).
#include <torch/extension.h>

#include "ops/lora.h"
#include "ops/settings.h"
#ifdef LX_EMULATE
#include "emu/emu.h"
#endif

#ifndef LORA_EXT_LIBRARY
#define LORA_EXT_LIBRARY lora_ext
#endif

namespace {

// The end of every signature.
#define LX_ADAPTERS "Tensor? ranks=None, Tensor? page_table=None, Tensor? plan=None"

#define LX_STRING_(x) #x
#define LX_STRING(x) LX_STRING_(x)

bool wants_grad(const at::Tensor& t) {
    return t.requires_grad();
}
bool wants_grad(const std::optional<at::Tensor>& t) {
    return t && t->requires_grad();
}
bool has_tangent(const at::Tensor& t) {
    return t._fw_grad(/*level=*/0).defined();
}
bool has_tangent(const std::optional<at::Tensor>& t) {
    return t && has_tangent(*t);
}

// What torch's own operators do above their kernels, for an op without a backward: refuse a
// gradient or a tangent instead of dropping it (also under torch.func, whose wrappers no kernel
// sees), and count a change in place, so that autograd notices a tensor that it had saved.
template <auto kOp, class Signature = std::remove_pointer_t<decltype(kOp)>>
struct NoBackward;
template <auto kOp, class Result, class... Args>
struct NoBackward<kOp, Result(Args...)> {
    static inline const char* name = nullptr;

    static const auto& handle() {
        static const auto op = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow(name, "")
                                   .template typed<Result(Args...)>();
        return op;
    }
    static Result autograd(c10::DispatchKeySet keys, Args... args) {
        TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(args) || ...), name,
                                    " has no forward-mode derivative");
        TORCH_CHECK(!c10::GradMode::is_enabled() || !(wants_grad(args) || ...), name,
                    " has no backward; call it under torch.no_grad(), or use lora_apply, which is "
                    "differentiable");
        const at::AutoDispatchBelowAutograd guard;
        return handle().redispatch(keys & c10::after_autograd_keyset, args...);
    }
    static void in_place(c10::DispatchKeySet keys, Args... args) {
        {
            const at::AutoDispatchBelowADInplaceOrView guard;
            handle().redispatch(keys & c10::after_ADInplaceOrView_keyset, args...);
        }
        torch::autograd::impl::bump_version(std::get<0>(std::tie(args...)));
    }
};
using Shrink = NoBackward<&lora_ext::lora_shrink>;
using Expand = NoBackward<&lora_ext::lora_expand_>;
using Apply = NoBackward<&lora_ext::lora_apply_>;

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

TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, Autograd, m) {
    Shrink::name = LX_STRING(LORA_EXT_LIBRARY) "::lora_shrink";
    Expand::name = LX_STRING(LORA_EXT_LIBRARY) "::lora_expand_";
    Apply::name = LX_STRING(LORA_EXT_LIBRARY) "::lora_apply_";
    m.impl("lora_shrink", TORCH_FN(Shrink::autograd));
    m.impl("lora_expand_", TORCH_FN(Expand::autograd));
    m.impl("lora_apply_", TORCH_FN(Apply::autograd));
}
TORCH_LIBRARY_IMPL(LORA_EXT_LIBRARY, ADInplaceOrView, m) {
    m.impl("lora_expand_", TORCH_FN(Expand::in_place));
    m.impl("lora_apply_", TORCH_FN(Apply::in_place));
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
