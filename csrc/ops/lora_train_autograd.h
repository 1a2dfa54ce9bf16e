// The backward of the training ops. Included by bindings.cpp alone, which knows the library's name.
//
// In C++ because a layer calls these ops hundreds of times per step. Every op inside is called
// through the dispatcher, so torch.compile traces this code like any operator of torch.
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/lora.h"
#include "ops/lora_train.h"

namespace lora_ext::autograd {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <auto kOp>
struct Handle;
template <class Result, class... Args, Result (*kOp)(Args...)>
struct Handle<kOp> {
    static inline const char* name = nullptr;
    static const auto& get() {
        static const auto op = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow(name, "")
                                   .template typed<Result(Args...)>();
        return op;
    }
};

inline Tensor or_undefined(const OptionalTensor& t) {
    return t.value_or(Tensor());
}
// Above the wrappers of torch.func, which no kernel sees: refuse a tangent instead of dropping it.
inline void refuse_tangents(const char* op, std::initializer_list<OptionalTensor> tensors) {
    for (const OptionalTensor& t : tensors)
        TORCH_CHECK_NOT_IMPLEMENTED(!t || !t->_fw_grad(/*level=*/0).defined(), op,
                                    " has no forward-mode derivative");
}
inline OptionalTensor or_none(const Tensor& t) {
    return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// Saved: x, v, the plan and the parameters; the mask of dropout is computed again from its seed.
// Ids on the CPU that are one number for all rows (stride 0) keep 4 bytes and no plan: it is made
// again, in the time that checking one would take.
struct Linear : torch::autograd::Function<Linear> {
    using Forward = Handle<&lora_linear_forward>;
    using Backward = Handle<&lora_linear_backward>;
    using Plan = Handle<&lora_plan>;

    static variable_list forward(AutogradContext* ctx, const Tensor& x,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const Tensor& a, const Tensor& b, const Tensor& adapter_ids,
                                 const OptionalTensor& scale, const OptionalTensor& ranks,
                                 double dropout_p, const OptionalTensor& seed,
                                 const OptionalTensor& given_plan) {
        const at::AutoDispatchBelowADInplaceOrView guard;
        const bool one_id =
            adapter_ids.is_cpu() && adapter_ids.dim() == 1 && adapter_ids.sym_stride(0) == 0;
        const OptionalTensor plan =
            given_plan || one_id
                ? given_plan
                : Plan::get().call(adapter_ids, a.sym_size(0).guard_int(__FILE__, __LINE__),
                                   std::nullopt);
        auto [y, v] = Forward::get().call(x, weight, bias, a, b, adapter_ids, scale, ranks,
                                          dropout_p, seed, plan);
        // The weight is for dx alone.
        ctx->save_for_backward({x, v, x.requires_grad() ? or_undefined(weight) : Tensor(), a, b,
                                adapter_ids, or_undefined(scale), or_undefined(ranks),
                                or_undefined(plan), or_undefined(seed)});
        ctx->saved_data["weight"] = weight.has_value();
        ctx->saved_data["dropout_p"] = dropout_p;
        ctx->saved_data["bias"] = bias.has_value();
        ctx->mark_non_differentiable({v});
        ctx->set_materialize_grads(false);
        return {y, v};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        variable_list out(11);
        const Tensor& dy = grads[0];
        if (!dy.defined()) return out;
        const variable_list saved = ctx->get_saved_variables();
        const Tensor &x = saved[0], &weight = saved[2];
        // Edges are counted over the tensors that were given.
        const bool has_weight = ctx->saved_data["weight"].toBool();
        const bool has_bias = ctx->saved_data["bias"].toBool();
        const size_t after = 1 + has_weight + has_bias;
        const bool need_dx = ctx->needs_input_grad(0), need_da = ctx->needs_input_grad(after),
                   need_db = ctx->needs_input_grad(after + 1);
        if (need_dx || need_da || need_db) {
            const auto [dx, da, db] = Backward::get().call(
                dy, x, saved[1], or_none(weight), saved[3], saved[4], saved[5], or_none(saved[6]),
                or_none(saved[7]), or_none(saved[8]), ctx->saved_data["dropout_p"].toDouble(),
                or_none(saved[9]), need_dx, need_da, need_db);
            if (need_dx) out[0] = dx;
            if (need_da) out[3] = da;
            if (need_db) out[4] = db;
        }
        if (has_weight && ctx->needs_input_grad(1)) out[1] = dy.t().mm(x);
        if (has_bias && ctx->needs_input_grad(1 + has_weight)) out[2] = dy.sum(0);
        return out;
    }
};

inline std::tuple<Tensor, Tensor> linear(c10::DispatchKeySet keys, const Tensor& x,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         const Tensor& a, const Tensor& b,
                                         const Tensor& adapter_ids, const OptionalTensor& scale,
                                         const OptionalTensor& ranks, double dropout_p,
                                         const OptionalTensor& seed, const OptionalTensor& plan) {
    refuse_tangents("lora_linear", {x, weight, bias, a, b, scale});
    TORCH_CHECK_NOT_IMPLEMENTED(!scale || !scale->requires_grad(),
                                "lora_linear: scale receives no gradient");
    if (c10::GradMode::is_enabled() &&
        (x.requires_grad() || a.requires_grad() || b.requires_grad() ||
         (weight && weight->requires_grad()) || (bias && bias->requires_grad()))) {
        const variable_list out =
            Linear::apply(x, weight, bias, a, b, adapter_ids, scale, ranks, dropout_p, seed, plan);
        return {out[0], out[1]};
    }
    const at::AutoDispatchBelowAutograd guard;
    return Linear::Forward::get().redispatch(keys & c10::after_autograd_keyset, x, weight, bias, a,
                                             b, adapter_ids, scale, ranks, dropout_p, seed, plan);
}

// As torch's linear: x and the parameters in autocast's dtype, each gradient in its own.
template <c10::DeviceType kDevice>
std::tuple<Tensor, Tensor> autocast_linear(const Tensor& x, const OptionalTensor& weight,
                                           const OptionalTensor& bias, const Tensor& a,
                                           const Tensor& b, const Tensor& adapter_ids,
                                           const OptionalTensor& scale, const OptionalTensor& ranks,
                                           double dropout_p, const OptionalTensor& seed,
                                           const OptionalTensor& plan) {
    const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
    const auto dtype = at::autocast::get_autocast_dtype(kDevice);
    const auto cast = [&](const auto& t) { return at::autocast::cached_cast(dtype, t, kDevice); };
    return Linear::Forward::get().call(cast(x), cast(weight), cast(bias), cast(a), cast(b),
                                       adapter_ids, scale, ranks, dropout_p, seed, plan);
}

// Its own backward: the mask is the same.
struct Dropout : torch::autograd::Function<Dropout> {
    using Forward = Handle<&lora_dropout>;

    static Tensor forward(AutogradContext* ctx, const Tensor& x, double p,
                          const OptionalTensor& seed) {
        const at::AutoDispatchBelowADInplaceOrView guard;
        ctx->save_for_backward({or_undefined(seed)});
        ctx->saved_data["p"] = p;
        return Forward::get().call(x, p, seed);
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const OptionalTensor seed = or_none(ctx->get_saved_variables()[0]);
        return {Forward::get().call(grads[0], ctx->saved_data["p"].toDouble(), seed), {}, {}};
    }
};

inline Tensor dropout(c10::DispatchKeySet keys, const Tensor& x, double p,
                      const OptionalTensor& seed) {
    refuse_tangents("lora_dropout", {x});
    if (c10::GradMode::is_enabled() && x.requires_grad()) return Dropout::apply(x, p, seed);
    const at::AutoDispatchBelowAutograd guard;
    return Dropout::Forward::get().redispatch(keys & c10::after_autograd_keyset, x, p, seed);
}

}  // namespace lora_ext::autograd
