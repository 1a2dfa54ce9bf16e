// Drafting and verification as C++ functions of tensors; ops/table.h has a row for each.
#pragma once

#include <string_view>
#include <tuple>

#include "ops/call.h"

namespace lora_ext {

Tensor circuit_conditional_dist(std::string_view kind, const Tensor& leaf,
                                const OptionalTensor& prior, const OptionalTensor& trans,
                                const Tensor& x, const Tensor& k);
// Returns tokens, conditional and posterior.
std::tuple<Tensor, Tensor, Tensor> circuit_sample(std::string_view kind, const Tensor& leaf,
                                                  const OptionalTensor& prior,
                                                  const OptionalTensor& trans,
                                                  const Tensor& uniforms,
                                                  const OptionalTensor& evidence);
// Returns tokens and value.
std::tuple<Tensor, Tensor> circuit_argmax(std::string_view kind, const Tensor& leaf,
                                          const OptionalTensor& prior, const OptionalTensor& trans,
                                          const OptionalTensor& evidence);
// Returns accepted and next_token.
std::tuple<Tensor, Tensor> spec_verify(const Tensor& target, const Tensor& tokens,
                                       const Tensor& conditional, const Tensor& posterior,
                                       const Tensor& leaf, const Tensor& uniforms,
                                       const OptionalTensor& num_evidence, double temperature);

}  // namespace lora_ext
