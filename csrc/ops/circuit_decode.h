// Drafting from circuits and verifying as C++ functions of tensors; bindings.cpp registers each
// under the same name.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace lora_ext {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;

Tensor circuit_conditional_dist(std::string_view kind, const Tensor& leaf,
                                const OptionalTensor& prior, const OptionalTensor& trans,
                                const Tensor& x, const Tensor& k);
// tokens, conditional, posterior
std::tuple<Tensor, Tensor, Tensor> circuit_sample(std::string_view kind, const Tensor& leaf,
                                                  const OptionalTensor& prior,
                                                  const OptionalTensor& trans,
                                                  const Tensor& uniforms,
                                                  const OptionalTensor& evidence);
// tokens, value
std::tuple<Tensor, Tensor> circuit_argmax(std::string_view kind, const Tensor& leaf,
                                          const OptionalTensor& prior, const OptionalTensor& trans,
                                          const OptionalTensor& evidence);
// accepted, next_token
std::tuple<Tensor, Tensor> spec_verify(const Tensor& target, const Tensor& tokens,
                                       const Tensor& conditional, const Tensor& posterior,
                                       const Tensor& leaf, const Tensor& uniforms,
                                       const OptionalTensor& num_evidence, double temperature);

}  // namespace lora_ext
