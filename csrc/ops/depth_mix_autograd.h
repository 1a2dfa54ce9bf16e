// Autograd function of depth_mix. Like autograd.h, this is included only by bindings.cpp.
#pragma once

#include "ops/autograd.h"
#include "ops/depth_mix.h"

namespace lora_ext::autograd {

// Autograd function of depth_mix; saves its inputs, the mixing weights, and one or two numbers per
// row and depth.
struct DepthMix : torch::autograd::Function<DepthMix> {
    using Forward = Handle<&depth_mix_forward>;
    using Backward = Handle<&depth_mix_backward>;

    // All tensors in one list, in the order of needs_input_grad: hiddens, gammas, betas, then the
    // weights, or the router and its bias.
    struct Inputs {
        std::vector<Tensor> hiddens, gammas, betas;
        OptionalTensor weights, router, bias;

        Inputs(at::TensorList all, int64_t depths, bool has_betas) {
            auto next = all.begin();
            for (auto* list : {&hiddens, &gammas, &betas}) {
                if (list == &betas && !has_betas) continue;
                list->assign(next, next + depths);
                next += depths;
            }
            if (all.end() - next == 1) {
                weights = next[0];
            } else {
                router = next[0];
                bias = next[1];
            }
        }
    };

    static variable_list forward(AutogradContext* ctx, at::TensorList all, int64_t depths,
                                 bool has_betas, double eps, std::string_view norm) {
        const at::AutoDispatchBelowADInplaceOrView guard;
        const Inputs in(all, depths, has_betas);
        auto [mixed, chosen, rinv, mean] = Forward::get().call(
            in.hiddens, in.gammas, in.betas, in.weights, in.router, in.bias, eps, norm);
        variable_list saved = all.vec();
        saved.insert(saved.end(), {chosen, rinv, mean});
        ctx->save_for_backward(std::move(saved));
        ctx->saved_data["depths"] = depths;
        ctx->saved_data["has_betas"] = has_betas;
        ctx->mark_non_differentiable(in.router ? variable_list{rinv, mean}
                                               : variable_list{chosen, rinv, mean});
        ctx->set_materialize_grads(false);
        return {mixed, chosen, rinv, mean};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        variable_list all = ctx->get_saved_variables();
        const Tensor mean = all.back(), rinv = all.end()[-2], chosen = all.end()[-3];
        all.resize(all.size() - 3);
        const int64_t depths = ctx->saved_data["depths"].toInt();
        const Inputs in(all, depths, ctx->saved_data["has_betas"].toBool());
        variable_list out(all.size() + 4);  // tensors, then the other arguments
        if (!grads[0].defined() && !grads[1].defined()) return out;
        const auto wanted = [&](size_t i) { return ctx->needs_input_grad(i); };
        bool need_hiddens = false;
        for (int64_t e = 0; e < depths; ++e) need_hiddens |= wanted(e);
        const Tensor dmixed = grads[0].defined() ? grads[0] : at::zeros_like(in.hiddens[0]);
        const auto [dhiddens, sums, dweights] = Backward::get().call(
            dmixed, or_none(grads[1]), in.hiddens, in.gammas, in.betas,
            in.weights ? *in.weights : chosen, in.router, rinv, mean, need_hiddens);

        // `sums` has rows of d numbers for gammas, betas and router, in the order of inputs.
        const auto width = in.hiddens[0].sym_size(-1);
        const auto give = [&](size_t i, const Tensor& gradient) {
            if (wanted(i)) out[i] = gradient.to(all[i].scalar_type());
        };
        const size_t vectors = depths + in.betas.size();
        for (int64_t e = 0; e < depths; ++e)
            if (wanted(e)) out[e] = dhiddens[e];
        for (size_t i = 0; i < vectors; ++i)
            give(depths + i, sums.narrow_symint(0, width * i, width));
        const size_t last = depths + vectors;
        if (in.router) {
            give(last, sums.narrow_symint(0, width * vectors, width * depths)
                           .view_symint({depths, width}));
            give(last + 1, sums.narrow_symint(0, width * (vectors + depths), depths));
        } else {
            give(last, dweights);
        }
        return out;
    }

    static std::tuple<Tensor, Tensor, Tensor, Tensor> call(
        c10::DispatchKeySet keys, const std::vector<Tensor>& hiddens,
        const std::vector<Tensor>& gammas, const std::vector<Tensor>& betas,
        const OptionalTensor& weights, const OptionalTensor& router, const OptionalTensor& bias,
        double eps, std::string_view norm) {
        refuse_tangents("depth_mix", hiddens, gammas, betas, weights, router, bias);
        const bool fits =
            gammas.size() == hiddens.size() && (betas.empty() || betas.size() == hiddens.size()) &&
            weights.has_value() != router.has_value() && router.has_value() == bias.has_value();
        // If the lists of inputs do not match in length, the op below raises.
        if (fits && c10::GradMode::is_enabled() &&
            (wants_grad(hiddens) || wants_grad(gammas) || wants_grad(betas) ||
             wants_grad(weights) || wants_grad(router) || wants_grad(bias))) {
            variable_list all = hiddens;
            for (const auto* list : {&gammas, &betas})
                all.insert(all.end(), list->begin(), list->end());
            for (const auto* t : {&weights, &router, &bias})
                if (*t) all.push_back(**t);
            const variable_list out =
                apply(at::TensorList(all), static_cast<int64_t>(hiddens.size()), !betas.empty(),
                      eps, norm);
            return {out[0], out[1], out[2], out[3]};
        }
        const at::AutoDispatchBelowAutograd guard;
        return Forward::get().redispatch(keys & c10::after_autograd_keyset, hiddens, gammas, betas,
                                         weights, router, bias, eps, norm);
    }
};

}  // namespace lora_ext::autograd
