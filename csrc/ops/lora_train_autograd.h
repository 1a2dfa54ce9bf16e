// Autograd functions of the training ops. Like autograd.h, this is included only by bindings.cpp.
#pragma once

#include <ATen/autocast_mode.h>

#include "ops/autograd.h"
#include "ops/lora.h"
#include "ops/lora_train.h"

namespace lora_ext::autograd {

// Autograd function of lora_linear; saves x, v, the plan and the parameters. The backward
// recomputes the dropout mask from its seed. If all rows share one id on the CPU (stride 0), the
// ids take 4 bytes and no plan is saved: rebuilding the plan takes as long as checking a saved one.
struct Linear : torch::autograd::Function<Linear> {
    using Forward = Handle<&lora_linear_forward>;
    using Backward = Handle<&lora_linear_backward>;
    using Plan = Handle<&lora_plan>;

    static variable_list forward(AutogradContext* ctx, const Tensor& x,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const Tensor& a, const Tensor& b, const Tensor& adapter_ids,
                                 const OptionalTensor& scale, const OptionalTensor& ranks,
                                 double dropout_p, const OptionalTensor& seed,
                                 const OptionalTensor& given_plan, const OptionalTensor& weights,
                                 const OptionalTensor& groups) {
        const at::AutoDispatchBelowADInplaceOrView guard;
        const bool one_id =
            adapter_ids.is_cpu() && adapter_ids.dim() == 1 && adapter_ids.sym_stride(0) == 0;
        const OptionalTensor plan =
            given_plan || one_id
                ? given_plan
                : Plan::get().call(adapter_ids,
                                   a.dim() == 2 ? 1 : a.sym_size(0).guard_int(__FILE__, __LINE__),
                                   std::nullopt);
        auto [y, v] = Forward::get().call(x, weight, bias, a, b, adapter_ids, scale, ranks,
                                          dropout_p, seed, plan, weights, groups);
        // The weight is needed only for dx.
        ctx->save_for_backward({x, v, x.requires_grad() ? or_undefined(weight) : Tensor(), a, b,
                                adapter_ids, or_undefined(scale), or_undefined(ranks),
                                or_undefined(plan), or_undefined(seed), or_undefined(weights),
                                or_undefined(groups)});
        ctx->saved_data["before_weights"] =
            scale.has_value() + ranks.has_value() + seed.has_value() + given_plan.has_value();
        ctx->saved_data["weight"] = weight.has_value();
        ctx->saved_data["dropout_p"] = dropout_p;
        ctx->saved_data["bias"] = bias.has_value();
        ctx->mark_non_differentiable({v});
        ctx->set_materialize_grads(false);
        return {y, v};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        variable_list out(13);
        const Tensor& dy = grads[0];
        if (!dy.defined()) return out;
        const variable_list saved = ctx->get_saved_variables();
        const Tensor &x = saved[0], &weight = saved[2];
        // Indices of needs_input_grad count only the tensors that are not None.
        const bool has_weight = ctx->saved_data["weight"].toBool();
        const bool has_bias = ctx->saved_data["bias"].toBool();
        const size_t after = 1 + has_weight + has_bias;
        const bool need_dx = ctx->needs_input_grad(0), need_da = ctx->needs_input_grad(after),
                   need_db = ctx->needs_input_grad(after + 1);
        const size_t of_weights =
            after + 3 + static_cast<size_t>(ctx->saved_data["before_weights"].toInt());
        const bool need_dweights = saved[10].defined() && ctx->needs_input_grad(of_weights);
        if (need_dx || need_da || need_db || need_dweights) {
            const auto [dx, da, db, dweights] = Backward::get().call(
                dy, x, saved[1], or_none(weight), saved[3], saved[4], saved[5], or_none(saved[6]),
                or_none(saved[7]), or_none(saved[8]), ctx->saved_data["dropout_p"].toDouble(),
                or_none(saved[9]), need_dx, need_da, need_db, or_none(saved[10]),
                or_none(saved[11]), need_dweights);
            if (need_dx) out[0] = dx;
            if (need_da) out[3] = da;
            if (need_db) out[4] = db;
            if (need_dweights) out[11] = dweights;
        }
        if (has_weight && ctx->needs_input_grad(1)) out[1] = dy.t().mm(x);
        if (has_bias && ctx->needs_input_grad(1 + has_weight)) out[2] = dy.sum(0);
        return out;
    }

    static std::tuple<Tensor, Tensor> call(c10::DispatchKeySet keys, const Tensor& x,
                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                           const Tensor& a, const Tensor& b,
                                           const Tensor& adapter_ids, const OptionalTensor& scale,
                                           const OptionalTensor& ranks, double dropout_p,
                                           const OptionalTensor& seed, const OptionalTensor& plan,
                                           const OptionalTensor& weights,
                                           const OptionalTensor& groups) {
        refuse_tangents("lora_linear", x, weight, bias, a, b, scale, weights);
        TORCH_CHECK_NOT_IMPLEMENTED(!wants_grad(scale), "lora_linear: scale receives no gradient");
        if (c10::GradMode::is_enabled() &&
            (wants_grad(x) || wants_grad(a) || wants_grad(b) || wants_grad(weight) ||
             wants_grad(bias) || wants_grad(weights))) {
            const variable_list out = apply(x, weight, bias, a, b, adapter_ids, scale, ranks,
                                            dropout_p, seed, plan, weights, groups);
            return {out[0], out[1]};
        }
        const at::AutoDispatchBelowAutograd guard;
        return Forward::get().redispatch(keys & c10::after_autograd_keyset, x, weight, bias, a, b,
                                         adapter_ids, scale, ranks, dropout_p, seed, plan, weights,
                                         groups);
    }

    // As in torch's linear, x and the parameters are cast to autocast's dtype, and gradients have
    // the dtype of their input.
    template <c10::DeviceType kDevice>
    static std::tuple<Tensor, Tensor> autocast(
        const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& a,
        const Tensor& b, const Tensor& adapter_ids, const OptionalTensor& scale,
        const OptionalTensor& ranks, double dropout_p, const OptionalTensor& seed,
        const OptionalTensor& plan, const OptionalTensor& weights, const OptionalTensor& groups) {
        const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
        const auto dtype = at::autocast::get_autocast_dtype(kDevice);
        const auto cast = [&](const auto& t) {
            return at::autocast::cached_cast(dtype, t, kDevice);
        };
        return Forward::get().call(cast(x), cast(weight), cast(bias), cast(a), cast(b), adapter_ids,
                                   scale, ranks, dropout_p, seed, plan, weights, groups);
    }
};

// The backward applies the same function with the same mask to the gradient.
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

    static Tensor call(c10::DispatchKeySet keys, const Tensor& x, double p,
                       const OptionalTensor& seed) {
        refuse_tangents("lora_dropout", x);
        if (c10::GradMode::is_enabled() && wants_grad(x)) return apply(x, p, seed);
        const at::AutoDispatchBelowAutograd guard;
        return Forward::get().redispatch(keys & c10::after_autograd_keyset, x, p, seed);
    }
};

}  // namespace lora_ext::autograd
