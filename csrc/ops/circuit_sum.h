// Sum layers as C++ functions of tensors; ops/table.h has a row for each.
#pragma once

#include <string_view>
#include <tuple>

#include "ops/call.h"

namespace lora_ext {

// Returns the weights scaled to row maximum 1 and the logarithms of the scales, for reuse.
std::tuple<Tensor, Tensor> log_einsum_weights(const Tensor& w, std::string_view norm);
Tensor log_einsum_exp(const Tensor& w, const Tensor& values, std::string_view norm,
                      std::string_view precision, const OptionalTensor& weight,
                      const OptionalTensor& shift);
// Returns dw and dvalues; a gradient that is not needed is empty.
std::tuple<Tensor, Tensor> log_einsum_exp_backward(const Tensor& dout, const Tensor& w,
                                                   const Tensor& values, const Tensor& out,
                                                   std::string_view norm, bool need_dw,
                                                   bool need_dvalues, const OptionalTensor& weight,
                                                   const OptionalTensor& shift);
// Returns the values and, in int32, the indices of the terms that attain them.
std::tuple<Tensor, Tensor> log_einsum_max(const Tensor& w, const Tensor& values,
                                          std::string_view norm);

}  // namespace lora_ext
