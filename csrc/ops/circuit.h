// The circuit ops as C++ functions of tensors; bindings.cpp registers each under the same name.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace lora_ext {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;

// e and lse (B, K, C).
std::tuple<Tensor, Tensor> circuit_leaf(const Tensor& leaf, const Tensor& x);
Tensor circuit_leaf_backward(const Tensor& de, const Tensor& leaf, const Tensor& x,
                             const Tensor& lse);
// prefix (B, K), conditional (B, K), posterior (B, K, C), and what the backward wants, empty
// without `save`.
std::tuple<Tensor, Tensor, Tensor, Tensor> circuit_scan(std::string_view kind, const Tensor& e,
                                                        const OptionalTensor& prior,
                                                        const OptionalTensor& trans, bool save);
// de, dprior, dtrans; one that is not needed comes back empty.
std::tuple<Tensor, Tensor, Tensor> circuit_scan_backward(
    const OptionalTensor& dprefix, const OptionalTensor& dconditional, std::string_view kind,
    const Tensor& e, const OptionalTensor& prior, const OptionalTensor& trans, const Tensor& states,
    bool need_prior, bool need_trans);

}  // namespace lora_ext
