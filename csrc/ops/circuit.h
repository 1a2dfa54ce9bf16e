// The circuit ops as C++ functions of tensors; ops/table.h has a row for each.
#pragma once

#include <string_view>
#include <tuple>

#include "ops/call.h"

namespace lora_ext {

// Returns e (B, K, C), the log-probability of each token, and the normalisers (2, B, K, C) of the
// rows of logits: the maximum, and the logarithm of the sum of exponentials. See
// lora_ext/circuit.h.
std::tuple<Tensor, Tensor> circuit_leaf(const Tensor& leaf, const Tensor& x);
Tensor circuit_leaf_backward(const Tensor& de, const Tensor& leaf, const Tensor& x,
                             const Tensor& norm);
// Returns e of circuit_leaf for logits emit[k, z] @ h[b]: h (B, D), emit (K, C, V, D), x (B, K).
Tensor emission_gather(const Tensor& h, const Tensor& emit, const Tensor& x);
// Returns dh and demit; a gradient that is not needed is empty.
std::tuple<Tensor, Tensor> emission_gather_backward(const Tensor& de, const Tensor& h,
                                                    const Tensor& emit, const Tensor& x,
                                                    bool need_h, bool need_emit);
// Returns prefix (B, K), conditional (B, K), posterior (B, K, C), and the states for the backward,
// which are empty without `save`.
std::tuple<Tensor, Tensor, Tensor, Tensor> circuit_scan(std::string_view kind, const Tensor& e,
                                                        const OptionalTensor& prior,
                                                        const OptionalTensor& trans, bool save);
// Returns de, dprior and dtrans; a gradient that is not needed is empty.
std::tuple<Tensor, Tensor, Tensor> circuit_scan_backward(
    const OptionalTensor& dprefix, const OptionalTensor& dconditional, std::string_view kind,
    const Tensor& e, const OptionalTensor& prior, const OptionalTensor& trans, const Tensor& states,
    bool need_prior, bool need_trans);

}  // namespace lora_ext
