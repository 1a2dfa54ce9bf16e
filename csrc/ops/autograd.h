// What stands above a kernel in the dispatcher: calls of ops by handle, refusals of gradients that
// an op does not have. Included by bindings.cpp alone.
//
// Backwards that run hundreds of times per step are in C++ (lora_train_autograd.h,
// circuit_autograd.h); every op inside them is called through the dispatcher, so torch.compile
// traces them like any operator of torch.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "ops/call.h"

namespace lora_ext::autograd {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The library's name, which register_ops sets.
inline const char* library = nullptr;

// The op of this library whose kernel is kOp; register_ops gives it its name.
template <auto kOp>
struct Handle;
template <class Result, class... Args, Result (*kOp)(Args...)>
struct Handle<kOp> {
    static inline const char* name = nullptr;
    static const auto& get() {
        static const auto op =
            c10::Dispatcher::singleton()
                .findSchemaOrThrow((std::string(library) + "::" + name).c_str(), "")
                .template typed<Result(Args...)>();
        return op;
    }
};

inline Tensor or_undefined(const OptionalTensor& t) {
    return t.value_or(Tensor());
}
inline OptionalTensor or_none(const Tensor& t) {
    return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// Arguments that are no tensors want no gradient and have no tangent.
template <class T>
bool wants_grad(const T&) {
    return false;
}
inline bool wants_grad(const Tensor& t) {
    return t.requires_grad();
}
inline bool wants_grad(const OptionalTensor& t) {
    return t && t->requires_grad();
}
inline bool wants_grad(const std::vector<Tensor>& tensors) {
    return std::any_of(tensors.begin(), tensors.end(),
                       [](const Tensor& t) { return t.requires_grad(); });
}
template <class T>
bool has_tangent(const T&) {
    return false;
}
inline bool has_tangent(const Tensor& t) {
    return t._fw_grad(/*level=*/0).defined();
}
inline bool has_tangent(const OptionalTensor& t) {
    return t && has_tangent(*t);
}
inline bool has_tangent(const std::vector<Tensor>& tensors) {
    return std::any_of(tensors.begin(), tensors.end(),
                       [](const Tensor& t) { return has_tangent(t); });
}

// A change in place is counted.
inline void count_change(const Tensor& t) {
    torch::autograd::impl::bump_version(t);
}
inline void count_change(const std::vector<Tensor>& tensors) {
    for (const Tensor& t : tensors) count_change(t);
}

// Refuses a tangent instead of dropping it. torch.func wraps tensors, and no kernel sees what its
// wrappers carry, so this is asked above the kernels.
template <class... Args>
void refuse_tangents(const char* op, const Args&... args) {
    TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(args) || ...), op, " has no forward-mode derivative");
}

// What torch's own operators do above their kernels, for an op without a backward: it refuses a
// gradient or a tangent, and counts a change in place, so that autograd notices a tensor that it
// had saved. kRemedy says what to do instead.
template <auto kOp, const char* kRemedy, class Signature = std::remove_pointer_t<decltype(kOp)>>
struct Refusal;
template <auto kOp, const char* kRemedy, class Result, class... Args>
struct Refusal<kOp, kRemedy, Result(Args...)> {
    static Result call(c10::DispatchKeySet keys, Args... args) {
        refuse_tangents(Handle<kOp>::name, args...);
        TORCH_CHECK(!c10::GradMode::is_enabled() || !(wants_grad(args) || ...), Handle<kOp>::name,
                    " has no backward; ", kRemedy);
        const at::AutoDispatchBelowAutograd guard;
        return Handle<kOp>::get().redispatch(keys & c10::after_autograd_keyset, args...);
    }
    static void in_place(c10::DispatchKeySet keys, Args... args) {
        {
            const at::AutoDispatchBelowADInplaceOrView guard;
            Handle<kOp>::get().redispatch(keys & c10::after_ADInplaceOrView_keyset, args...);
        }
        count_change(std::get<0>(std::tie(args...)));
    }
};

}  // namespace lora_ext::autograd
