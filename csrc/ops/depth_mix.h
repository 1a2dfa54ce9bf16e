// Mixes of normalised hidden states as C++ functions of tensors; ops/table.h has a row for each.
#pragma once

#include <string_view>
#include <tuple>
#include <vector>

#include "ops/call.h"

namespace lora_ext {

// Takes either weights, or a router and its bias. Returns the mix, the weights computed by the
// router (empty without a router), and values for the backward: 1 / rms (N, k), and the means for
// norm "layer".
std::tuple<Tensor, Tensor, Tensor, Tensor> depth_mix_forward(
    const std::vector<Tensor>& hiddens, const std::vector<Tensor>& gammas,
    const std::vector<Tensor>& betas, const OptionalTensor& weights, const OptionalTensor& router,
    const OptionalTensor& bias, double eps, std::string_view norm);

// Returns dhiddens (empty if not needed), all sums over rows in the layout of DepthMixArgs::sums,
// and dweights (..., k), which are the gradients of the router's logits if there is a router.
// `weights` are the mixing weights, `dweights` the gradient from their other uses.
std::tuple<std::vector<Tensor>, Tensor, Tensor> depth_mix_backward(
    const Tensor& dmixed, const OptionalTensor& dweights, const std::vector<Tensor>& hiddens,
    const std::vector<Tensor>& gammas, const std::vector<Tensor>& betas, const Tensor& weights,
    const OptionalTensor& router, const Tensor& rinv, const Tensor& mean, bool need_hiddens);

}  // namespace lora_ext
