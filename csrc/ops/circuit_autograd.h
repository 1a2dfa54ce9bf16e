// Autograd functions of the circuit ops. Like autograd.h, this is included only by bindings.cpp.
#pragma once

#include "ops/autograd.h"
#include "ops/circuit.h"
#include "ops/circuit_layers.h"

namespace lora_ext::autograd {

// Autograd function of circuit_leaf; saves the logits, the tokens and the norms.
struct CircuitLeaf : torch::autograd::Function<CircuitLeaf> {
    using Forward = Handle<&circuit_leaf>;
    using Backward = Handle<&circuit_leaf_backward>;

    static variable_list forward(AutogradContext* ctx, const Tensor& leaf, const Tensor& x) {
        const at::AutoDispatchBelowADInplaceOrView guard;
        auto [e, norm] = Forward::get().call(leaf, x);
        ctx->save_for_backward({leaf, x, norm});
        ctx->mark_non_differentiable({norm});
        ctx->set_materialize_grads(false);
        return {e, norm};
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        if (!grads[0].defined()) return {{}, {}};
        const variable_list saved = ctx->get_saved_variables();
        return {Backward::get().call(grads[0], saved[0], saved[1], saved[2]), {}};
    }

    static std::tuple<Tensor, Tensor> call(c10::DispatchKeySet keys, const Tensor& leaf,
                                           const Tensor& x) {
        refuse_tangents("circuit_leaf", leaf);
        if (c10::GradMode::is_enabled() && wants_grad(leaf)) {
            const variable_list out = apply(leaf, x);
            return {out[0], out[1]};
        }
        const at::AutoDispatchBelowAutograd guard;
        return Forward::get().redispatch(keys & c10::after_autograd_keyset, leaf, x);
    }
};

// Autograd function of circuit_table; saves its inputs, and the backward recomputes the norms.
struct CircuitTable : torch::autograd::Function<CircuitTable> {
    using Forward = Handle<&circuit_table>;
    using Backward = Handle<&circuit_table_backward>;

    static Tensor forward(AutogradContext* ctx, const Tensor& table, const Tensor& x,
                          const Tensor& row, int64_t block, std::string_view norm) {
        const at::AutoDispatchBelowADInplaceOrView guard;
        ctx->save_for_backward({table, x, row});
        ctx->saved_data["block"] = block;
        ctx->saved_data["norm"] = std::string(norm);
        return Forward::get().call(table, x, row, block, norm);
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const variable_list saved = ctx->get_saved_variables();
        const Tensor dtable = Backward::get().call(grads[0], saved[0], saved[1], saved[2],
                                                   ctx->saved_data["block"].toInt(),
                                                   ctx->saved_data["norm"].toStringRef());
        return {dtable, {}, {}, {}, {}};
    }

    static Tensor call(c10::DispatchKeySet keys, const Tensor& table, const Tensor& x,
                       const Tensor& row, int64_t block, std::string_view norm) {
        refuse_tangents("circuit_table", table);
        if (c10::GradMode::is_enabled() && wants_grad(table))
            return apply(table, x, row, block, norm);
        const at::AutoDispatchBelowAutograd guard;
        return Forward::get().redispatch(keys & c10::after_autograd_keyset, table, x, row, block,
                                         norm);
    }
};

// Autograd function of emission_gather; saves its inputs, and the backward recomputes the logits.
struct EmissionGather : torch::autograd::Function<EmissionGather> {
    using Forward = Handle<&emission_gather>;
    using Backward = Handle<&emission_gather_backward>;

    static Tensor forward(AutogradContext* ctx, const Tensor& h, const Tensor& emit,
                          const Tensor& x) {
        const at::AutoDispatchBelowADInplaceOrView guard;
        ctx->save_for_backward({h, emit, x});
        return Forward::get().call(h, emit, x);
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const variable_list saved = ctx->get_saved_variables();
        const bool need_h = ctx->needs_input_grad(0), need_emit = ctx->needs_input_grad(1);
        const auto [dh, demit] =
            Backward::get().call(grads[0], saved[0], saved[1], saved[2], need_h, need_emit);
        return {need_h ? dh : Tensor(), need_emit ? demit : Tensor(), {}};
    }

    static Tensor call(c10::DispatchKeySet keys, const Tensor& h, const Tensor& emit,
                       const Tensor& x) {
        refuse_tangents("emission_gather", h, emit);
        if (c10::GradMode::is_enabled() && (wants_grad(h) || wants_grad(emit)))
            return apply(h, emit, x);
        const at::AutoDispatchBelowAutograd guard;
        return Forward::get().redispatch(keys & c10::after_autograd_keyset, h, emit, x);
    }
};

// Autograd function of circuit_scan; saves e, the parameters and the states of the walk.
struct CircuitScan : torch::autograd::Function<CircuitScan> {
    using Forward = Handle<&circuit_scan>;
    using Backward = Handle<&circuit_scan_backward>;

    static variable_list forward(AutogradContext* ctx, std::string_view kind, const Tensor& e,
                                 const OptionalTensor& prior, const OptionalTensor& trans) {
        const at::AutoDispatchBelowADInplaceOrView guard;
        auto [prefix, conditional, posterior, states] =
            Forward::get().call(kind, e, prior, trans, /*save=*/true);
        ctx->save_for_backward({e, or_undefined(prior), or_undefined(trans), states});
        ctx->saved_data["kind"] = std::string(kind);
        ctx->mark_non_differentiable({posterior, states});
        ctx->set_materialize_grads(false);
        return {prefix, conditional, posterior, states};
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        variable_list out(4);
        if (!grads[0].defined() && !grads[1].defined()) return out;
        const variable_list saved = ctx->get_saved_variables();
        const OptionalTensor prior = or_none(saved[1]), trans = or_none(saved[2]);
        // Indices of needs_input_grad count only the tensors that are not None.
        const bool need_prior = prior && ctx->needs_input_grad(1);
        const bool need_trans = trans && ctx->needs_input_grad(1 + prior.has_value());
        const std::string kind = ctx->saved_data["kind"].toStringRef();
        const auto [de, dprior, dtrans] =
            Backward::get().call(or_none(grads[0]), or_none(grads[1]), kind, saved[0], prior, trans,
                                 saved[3], need_prior, need_trans);
        if (ctx->needs_input_grad(0)) out[1] = de;
        if (need_prior) out[2] = dprior;
        if (need_trans) out[3] = dtrans;
        return out;
    }

    static std::tuple<Tensor, Tensor, Tensor, Tensor> call(c10::DispatchKeySet keys,
                                                           std::string_view kind, const Tensor& e,
                                                           const OptionalTensor& prior,
                                                           const OptionalTensor& trans, bool save) {
        refuse_tangents("circuit_scan", e, prior, trans);
        if (c10::GradMode::is_enabled() &&
            (wants_grad(e) || wants_grad(prior) || wants_grad(trans))) {
            const variable_list out = apply(kind, e, prior, trans);
            return {out[0], out[1], out[2], out[3]};
        }
        const at::AutoDispatchBelowAutograd guard;
        return Forward::get().redispatch(keys & c10::after_autograd_keyset, kind, e, prior, trans,
                                         save);
    }
};

}  // namespace lora_ext::autograd
