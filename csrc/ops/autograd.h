// Dispatcher layer above the kernels: typed handles of the ops, and errors for ops without a
// gradient. Only bindings.cpp includes it.
//
// Backwards that run hundreds of times per step are in C++ (lora_train_autograd.h,
// circuit_autograd.h). They call ops through the dispatcher, so torch.compile traces them like any
// operator of torch.
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

// Name of the library, set by register_ops.
inline const char* library = nullptr;

// Handle of the op whose kernel is kOp; register_ops sets the name.
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
    static Result call(Args... args) { return get().call(std::forward<Args>(args)...); }
};

inline Tensor or_undefined(const OptionalTensor& t) {
    return t.value_or(Tensor());
}
inline OptionalTensor or_none(const Tensor& t) {
    return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// Arguments other than tensors have neither gradient nor tangent.
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

// Increments the version counter of a tensor that was changed in place.
inline void count_change(const Tensor& t) {
    torch::autograd::impl::bump_version(t);
}
inline void count_change(const std::vector<Tensor>& tensors) {
    for (const Tensor& t : tensors) count_change(t);
}

// Raises if an argument has a forward-mode tangent, which would otherwise be dropped silently. The
// check runs above the kernels, because torch.func wraps tensors and a kernel does not see the
// tangent of a wrapper.
template <class... Args>
void refuse_tangents(const char* op, const Args&... args) {
    TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(args) || ...), op, " has no forward-mode derivative");
}

// Autograd layer of an op without a backward, like the one that torch generates for its own
// operators: it raises if an input requires a gradient or has a tangent, and increments the version
// counter of a tensor that is changed in place, so that autograd detects a stale saved tensor.
// kRemedy ends the error message and names the alternative.
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
