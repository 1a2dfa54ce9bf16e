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
Tensor packed_lora_linear(const Tensor& x, const Tensor& packed, const OptionalTensor& bias,
                          int64_t out_features, bool int8, const Tensor& a, const Tensor& b,
                          const Tensor& adapter_ids, const OptionalTensor& scale,
                          const OptionalTensor& ranks, const OptionalTensor& page_table,
                          const OptionalTensor& plan, const OptionalTensor& weights,
                          const OptionalTensor& groups);

// Functions called before each product. They are not ops; each replaces several Python calls.

// Returns whether x W^T + b multiplies at least one dense row by a weight (out_features, I), in the
// dtype and on the device of W, without gradients, autocast, tracing and transforms of torch.func.
bool is_plain_product(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                      int64_t out_features);
// Returns whether a tensor has the bits of its contiguous copy. For a few hundred values with a
// stride, it takes a tenth of the time of at::equal.
bool same_bits(const Tensor& t, const Tensor& copy);

}  // namespace lora_ext
