// Products with packed weights as functions of tensors, documented in
// lora_ext/ops/packed_linear.py.
#pragma once

#include "ops/call.h"

namespace lora_ext {

Tensor pack_weight(const Tensor& weight);
Tensor packed_linear(const Tensor& x, const Tensor& packed, const OptionalTensor& bias,
                     int64_t out_features);

}  // namespace lora_ext
