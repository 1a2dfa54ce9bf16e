// Products with packed weights as functions of tensors, documented in
// lora_ext/ops/packed_linear.py.
#pragma once

#include "ops/call.h"

namespace lora_ext {

Tensor pack_weight(const Tensor& weight, std::optional<int64_t> bits, int64_t group, bool minimum);
Tensor unpack_weight(const Tensor& packed, int64_t out_features, int64_t in_features,
                     std::optional<at::ScalarType> dtype);
Tensor packed_linear(const Tensor& x, const Tensor& packed, const OptionalTensor& bias,
                     int64_t out_features, bool int8);

}  // namespace lora_ext
