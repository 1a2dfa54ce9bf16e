// Sum layers as C++ functions of tensors; bindings.cpp registers each under the same name.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

namespace lora_ext {

using at::Tensor;

Tensor log_einsum_exp(const Tensor& w, const Tensor& values, std::string_view norm,
                      std::string_view precision);
// dw, dvalues; one that is not needed comes back empty.
std::tuple<Tensor, Tensor> log_einsum_exp_backward(const Tensor& dout, const Tensor& w,
                                                   const Tensor& values, const Tensor& out,
                                                   std::string_view norm, bool need_dw,
                                                   bool need_dvalues);
// Values and, int32, the terms that attain them.
std::tuple<Tensor, Tensor> log_einsum_max(const Tensor& w, const Tensor& values,
                                          std::string_view norm);

}  // namespace lora_ext
