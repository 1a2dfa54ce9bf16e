// The training ops as C++ functions of tensors; ops/table.h has a row for each.
#pragma once

#include <tuple>

#include "ops/call.h"

namespace lora_ext {

std::tuple<Tensor, Tensor> lora_linear_forward(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& a,
    const Tensor& b, const Tensor& adapter_ids, const OptionalTensor& scale,
    const OptionalTensor& ranks, double dropout_p, const OptionalTensor& seed,
    const OptionalTensor& plan, const OptionalTensor& weights, const OptionalTensor& groups);
// Returns dx, da, db and dweights; a gradient that is not needed is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& v, const OptionalTensor& weight,
    const Tensor& a, const Tensor& b, const Tensor& adapter_ids, const OptionalTensor& scale,
    const OptionalTensor& ranks, const OptionalTensor& plan, double dropout_p,
    const OptionalTensor& seed, bool need_dx, bool need_da, bool need_db,
    const OptionalTensor& weights, const OptionalTensor& groups, bool need_dweights);
Tensor lora_dropout(const Tensor& x, double p, const OptionalTensor& seed);

}  // namespace lora_ext
